"""Fixtures shared by the trainer's tests: tiny models of three families, built here and now, without a network."""

import gc
import os


# Before anything imports torch, transformers or trl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DO_NOT_TRACK="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    WANDB_DISABLED="true",
)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from sapo_trl.embedded import WarmStartConfig, build_processor, build_tokenizer, warm_start  # noqa: E402
from tests.testing_utils import FAMILIES, Family, build_qwen3_vl_processor  # noqa: E402


torch.set_num_threads(1)
# The time of an example depends on the other work of the machine.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_finish(session):
    """accelerate collects garbage at the start of every training: spare it the objects of all imports and tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def qwen2_5_vl_processor():
    # A tokenizer of its own: saving a processor makes its tokenizer remember that it is part of one.
    return build_processor(build_tokenizer())


@pytest.fixture(scope="session")
def qwen3_vl_processor():
    return build_qwen3_vl_processor(build_tokenizer())


@pytest.fixture
def family(request, tokenizer, qwen2_5_vl_processor, qwen3_vl_processor) -> Family:
    """One of the model families, by name (`indirect` parametrisation), with its processing class."""
    processing_class = {
        "qwen2": tokenizer,
        "qwen2_5_vl": qwen2_5_vl_processor,
        "qwen3_vl": qwen3_vl_processor,
    }[request.param]
    return FAMILIES[request.param](processing_class)


@pytest.fixture(scope="session")
def warm_folder(tmp_path_factory):
    """
    The embedded task's model after seconds of imitation: it writes solutions in the right form, and is right by chance
    once in thirty.
    """
    config = WarmStartConfig(
        problems=512, batch_size=16, cooldown_steps=80, target_reading_accuracy=0.0, target_solved=0.0
    )
    return warm_start(tmp_path_factory.mktemp("cache"), config)
