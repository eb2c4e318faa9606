r"""
Prompt templates: what stands around a question.

A template is text with `{problem}` where the question goes. `think_boxed` is, to the letter, the prompt of the
Geometry3K recipes of EasyR1, verl and the paper's official code, where it follows the question after a space.
`math_task` is what VinePPO's checkpoints (`realtreetune/…`) were tuned on. The other texts are proposed here: they ask
for the forms that `segmentation="step"` and SRPO's role patterns look for. The benchmarks' prompts are made of these
texts: a model is evaluated with the very words that it was trained with.
"""

from ..names import nearest_name


_BOX = r"The final answer MUST BE put in \boxed{}."
_THINK_TAGS = "The reasoning process MUST BE enclosed within <think> </think> tags."
THINK = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    + _THINK_TAGS
)
"""What asks for thinking; a sentence that says what goes into the box follows."""

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
            A name from [`TEMPLATES`], or text of your own: with `{problem}`, which the question takes the place of, or
            without, to follow the question after a space.

    Returns:
        `str`: Text with `{problem}`. Raises `ValueError` for a single word that is no name.
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
