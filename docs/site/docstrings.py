r"""
An extension of griffe: docstrings in the Hugging Face manner, as mkdocstrings reads them.

There a parameter's type and default stand in the docstring, `` (`int`, *optional*, defaults to `1`) ``; the site takes
both from the signature. References such as [`~trl.GRPOConfig`] become code.
"""

from __future__ import annotations

import re

from griffe import Attribute, Class, Extension, Function, Module, Object


REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
PARAMETER = re.compile(r"^( *\*{0,2}\w+) \(.*?\):(?=\s)", re.MULTILINE)
GROUP = re.compile(r"^ +> .*\n\n?", re.MULTILINE)
RETURNED_TYPE_ALONE = re.compile(r"^Returns:\n +(?:`[^`\n]*`|\[`[^`\n]*`\])\n?(?:\n|\Z)", re.MULTILINE)
RETURNED_TYPE = re.compile(r"^(Returns:\n +)(?:`[^`\n]*`|\[`[^`\n]*`\])(?: \([^)\n]*\))?:\s+(?=\S)", re.MULTILINE)


class HuggingFaceDocstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_module_instance(self, *, mod: Module, **kwargs) -> None:
        _rewrite(mod)

    def on_class_instance(self, *, cls: Class, **kwargs) -> None:
        _rewrite(cls)

    def on_function_instance(self, *, func: Function, **kwargs) -> None:
        _rewrite(func)

    def on_attribute_instance(self, *, attr: Attribute, **kwargs) -> None:
        _rewrite(attr)


def _rewrite(item: Object) -> None:
    if item.docstring is None:
        return
    text = GROUP.sub("", item.docstring.value)
    text = PARAMETER.sub(r"\1:", text)
    text = RETURNED_TYPE_ALONE.sub("", text)
    text = RETURNED_TYPE.sub(r"\1", text)
    item.docstring.value = REFERENCE.sub(lambda match: f"`{match[1].rsplit('.', 1)[-1]}`", text)
