r"""
Prompt templates: the text around a question.

A template is a text with `{problem}`, which the question replaces. `think_boxed` is, to the letter, the prompt of the
Geometry3K recipes of EasyR1, verl and the paper's official code. There it follows the question after a space.
`math_task` is the prompt of VinePPO's checkpoints (`realtreetune/…`). The other texts are our own. They ask for the
forms that `segmentation="step"` and SRPO's role patterns look for. The benchmarks use the same texts, so a model is
evaluated with the words of its training.
"""

from ..names import nearest_name


_BOX = r"The final answer MUST BE put in \boxed{}."
_THINK_TAGS = "The reasoning process MUST BE enclosed within <think> </think> tags."
THINK = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    + _THINK_TAGS
)
"""Asks for thinking. A sentence about the box's content must follow."""

TEMPLATES: dict[str, str] = {
    "none": "{problem}",
    "boxed": "{problem} " + _BOX,
    "think_boxed": f"{{problem}} {THINK} {_BOX}",
    "think_boxed_below": f"{{problem}}\n\n{THINK} {_BOX}",
    "think_steps_boxed": (
        "{problem} You FIRST think about the reasoning process in numbered steps and then provide the final answer. "
        'Each step MUST BEGIN on a new line with "Step n:", where n counts the steps from 1. '
        f"{_THINK_TAGS} {_BOX}"
    ),
    "perception_think_boxed": (
        "{problem} You FIRST describe what the image shows, THEN think about the reasoning process and then provide "
        "the final answer. The description MUST BE enclosed within <perception> </perception> tags and MUST NOT "
        f"reason. {_THINK_TAGS} {_BOX}"
    ),
    "math_task": "[MATH_TASK] Problem:\n{problem}\n\nSolution:",
}


def template_text(template: str) -> str:
    """
    Args:
        template (`str`):
            A name from [`TEMPLATES`], or a text of your own. The question replaces `{problem}` in the text. A text
            without `{problem}` follows the question after a space.

    Returns:
        `str`: Text with `{problem}`. Raises `ValueError` for a single word that is not a name.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{problem}" in template:
        return template
    if len(template.split()) < 2:  # a mistyped name must not become a prompt
        raise ValueError(
            f"`prompt_template={template!r}` is neither one of {list(TEMPLATES)} nor a text."
            f"{nearest_name(template, TEMPLATES)}"
        )
    return "{problem} " + template
