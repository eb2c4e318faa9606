"""
Makes the messages of a data set safe.

Chat templates and processors fetch and open every file or address in a block. So every picture is moved from its block
to the column `images`, where it is checked. Only blocks of text and places for pictures remain.
"""

from collections.abc import Mapping
from typing import Any

from datasets import List, Value

from .images import from_base64
from .question import BadRow


OTHER_MEDIA = ("video", "videos", "audio", "audios")
"""Column names, and prefixes of block types, for media that this package does not read."""

_SOURCES = ("image", "image_url", "url", "path", "base64")


def holds_blocks(prompt: Any) -> bool:
    """Whether the messages of a column with this feature may have blocks as content."""
    if isinstance(prompt, Value):
        return False
    message = prompt.feature if isinstance(prompt, List) else prompt
    return not (isinstance(message, Mapping) and isinstance(message.get("content"), Value))


def take_images(messages: Any, images: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    Take the pictures out of messages.

    Args:
        messages (`Any`):
            A prompt: a list of mappings with `role` and `content`. The content is text or a list of blocks.
        images (`list`):
            Pictures of the row's own column, for blocks that name no picture.

    Returns:
        `tuple[list[dict], list]`: the messages, with only blocks of text and `{"type": "image"}`; and all pictures in
        the order of their places, undecoded. Raises [`BadRow`] for any other block, and if the blocks need more
        pictures than the column has.
    """
    if not isinstance(messages, list | tuple) or not all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages
    ):
        raise BadRow("unreadable prompt", f"no list of messages, each with a role: {repr(messages)[:200]}")
    own = iter(images)
    found: list[Any] = []
    plain = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, list | tuple):
            blocks = [_plain(block) for block in content]
            places = [source for block, source in blocks if block["type"] == "image"]
            if places and message["role"] == "tool":
                raise BadRow("image count", "TRL puts no pictures into messages of the role 'tool'")
            found += [next(own, None) if source is None else source for source in places]
            message["content"] = [block for block, _ in blocks]
        elif not isinstance(content, str) and (content is not None or message["role"] == "user"):
            raise BadRow("unreadable prompt", f"a message's content is neither text nor blocks: {repr(content)[:200]}")
        plain.append(message)
    if any(image is None for image in found):
        raise BadRow("image count", f"the messages have more places for pictures than the row has: {len(images)}")
    if found:  # otherwise TRL would add places for all pictures to the first user message that is plain text
        plain = [_as_blocks(message) for message in plain]
    return plain, found + list(own)


def _as_blocks(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _plain(block: Any) -> tuple[dict[str, str], Any]:
    """A block reduced to its text or to a place for a picture; and the picture that the block names, if any."""
    given = _filled(block) if isinstance(block, Mapping) else {}
    kind = given.pop("type", None)
    if kind == "text" and given.keys() <= {"text"} and isinstance(text := given.get("text", ""), str):
        return {"type": "text", "text": text}, None
    if isinstance(kind, str) and kind.removeprefix("input_").startswith(OTHER_MEDIA):
        raise BadRow("video or sound", f"a block of type {kind!r}, which is not read")
    if kind in ("image", "image_url") and len(given) <= 1 and given.keys() <= set(_SOURCES):
        return {"type": "image"}, _source(given)
    raise BadRow("unreadable prompt", f"a block that is neither text nor one picture: {repr(block)[:200]}")


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping without empty values. In a table, each block has the keys of all other blocks."""
    filled = {key: _filled(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in filled.items() if value not in (None, "", {})}


def _source(given: Mapping[str, Any]) -> Any:
    (name, source), *_ = given.items() or [(None, None)]
    if name == "image_url" and isinstance(source, Mapping):  # OpenAI's form: `url`, and optionally `detail`
        source = source.get("url")
    if name is not None and source is None:
        raise BadRow("missing image", f"`{name}` names no picture")
    return from_base64(source) if name == "base64" and isinstance(source, str) else source
