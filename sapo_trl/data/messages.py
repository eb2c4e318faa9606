"""
Messages that a data set already has, made safe: chat templates and processors fetch and open whatever a block names.

Every picture that a block names is taken out, to go the way of the column `images`. Blocks of text and places for
pictures are all that is left.
"""

from collections.abc import Mapping
from typing import Any

from datasets import List, Value

from .images import from_base64
from .question import BadRow


OTHER_MEDIA = ("video", "videos", "audio", "audios")
"""Names of columns, and beginnings of types of blocks, with media that nothing here reads."""

_SOURCES = ("image", "image_url", "url", "path", "base64")


def holds_blocks(prompt: Any) -> bool:
    """Whether messages of a column may be made of blocks, by the column's feature."""
    if isinstance(prompt, Value):
        return False
    message = prompt.feature if isinstance(prompt, List) else prompt
    return not (isinstance(message, Mapping) and isinstance(message.get("content"), Value))


def take_images(messages: Any, images: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    Take the pictures out of messages.

    Args:
        messages (`Any`):
            A prompt: a list of mappings with `role` and `content`, which is text or a list of blocks.
        images (`list`):
            Pictures of the row's own column, for the places that name none.

    Returns:
        `tuple[list[dict], list]`: the messages with nothing but blocks of text and `{"type": "image"}`; and all
        pictures in the order of their places, undecoded. Raises [`BadRow`] for any other block, and if there are not
        as many places as pictures in the column.
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
    if found:  # else TRL would put places for all of them in front of the first user's message that is text
        plain = [_as_blocks(message) for message in plain]
    return plain, found + list(own)


def _as_blocks(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _plain(block: Any) -> tuple[dict[str, str], Any]:
    """A block with nothing but its text, or its place; and the picture that it names, if it names one."""
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
    """Without empty keys: columns of a table give each block the keys of all others."""
    filled = {key: _filled(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in filled.items() if value not in (None, "", {})}


def _source(given: Mapping[str, Any]) -> Any:
    (name, source), *_ = given.items() or [(None, None)]
    if name == "image_url" and isinstance(source, Mapping):  # OpenAI's form, where `detail` may stand beside `url`
        source = source.get("url")
    if name is not None and source is None:
        raise BadRow("missing image", f"`{name}` names no picture")
    return from_base64(source) if name == "base64" and isinstance(source, str) else source
