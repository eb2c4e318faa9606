"""Adapters of every type in PEFT with every critic: the policy starts as itself, trains, and loads as it was saved."""

import copy
import dataclasses
import re

import peft
import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed

from sapo_trl import SegmentValueHead
from sapo_trl.critic.adapter_config import critic_config
from tests.testing_utils import (
    fixed_rollout,
    logged,
    random_completions,
    sapo_trainer,
    state_of,
    unmoved,
)


TEXT_FAMILY = pytest.mark.parametrize("family", ["qwen2"], indirect=True)
CRITICS = ("none", "shared", "separate", "adapter", "ladder")
TARGETS = ["q_proj", "v_proj", "down_proj"]
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
# The end of each prompt, so that the adapter of an activated LoRA acts on the responses.
END_OF_PROMPT = [286, 212]
# Some of them are in each rollout.
TOKENS = list(range(20, 120))


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})


# Adapters that start as the identity.
IDENTITIES = {
    "LoRA": lora(),
    "LoRA, gaussian": lora(init_lora_weights="gaussian"),
    "LoRA, orthogonal": lora(init_lora_weights="orthogonal"),
    "LoRA, eva": lora(init_lora_weights="eva"),
    "DoRA": lora(use_dora=True),
    "rsLoRA": lora(use_rslora=True),
    "LoRA, patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "LoRA, layers": lora(layers_to_transform=[1]),
    "LoRA, parameters": LoraConfig(r=4, target_modules=[], target_parameters=["mlp.down_proj.weight"]),
    "LoRA, tokens": lora(trainable_token_indices=TOKENS),
    "LoRA, LM head": lora(modules_to_save=["lm_head"], ensure_weight_tying=True),
    "LoRA, lora_bias": lora(lora_bias=True),
    "LoRA, bias": lora(bias="lora_only"),
    "aLoRA": lora(task_type="CAUSAL_LM", alora_invocation_tokens=END_OF_PROMPT),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "AdaLoRA": AdaLoraConfig(target_modules=TARGETS, total_step=10, init_r=4, target_r=2),
    "BOFT": BOFTConfig(target_modules=TARGETS, boft_block_size=4),
    "HRA": HRAConfig(target_modules=TARGETS),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LN tuning": LNTuningConfig(target_modules=["input_layernorm"]),
    "LoHa": LoHaConfig(target_modules=TARGETS),
    "LoKr": LoKrConfig(target_modules=TARGETS),
    "OFT": OFTConfig(target_modules=TARGETS, oft_block_size=4, use_cayley_neumann=False),
    "RandLoRA": RandLoraConfig(target_modules=TARGETS, r=4),
    "VeRA": VeraConfig(target_modules=TARGETS, r=4),
}
# Adapters that start at random numbers.
OTHERS = {
    "VB-LoRA": VBLoRAConfig(target_modules=TARGETS, num_vectors=8, vector_length=8, topk=2, r=2),
    "prompt tuning": PromptTuningConfig(**VIRTUAL),
    "p-tuning": PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8),
    "prefix tuning": PrefixTuningConfig(**VIRTUAL),
}
ADAPTERS = IDENTITIES | OTHERS
# All other types that TRL trains. (AdaMSS needs scikit-learn.)
RARE = {
    "BEFT": peft.BeftConfig(target_modules=TARGETS),
    "C3A": peft.C3AConfig(target_modules=TARGETS, block_size=4),
    "Cartridge": peft.CartridgeConfig(**VIRTUAL),
    "DEFT": peft.DeftConfig(target_modules=TARGETS),
    "DeLoRA": peft.DeloraConfig(target_modules=TARGETS),
    "FourierFT": peft.FourierFTConfig(target_modules=TARGETS, n_frequency=10),
    "FRoD": peft.FrodConfig(target_modules=TARGETS, progressbar=False),
    "GLoRA": peft.GloraConfig(target_modules=TARGETS),
    "GraLoRA": peft.GraloraConfig(target_modules=TARGETS),
    "HiRA": peft.HiraConfig(target_modules=TARGETS),
    "KaSA": lora(kasa_config=peft.KasaConfig()),
    "Lily": peft.LilyConfig(target_modules=TARGETS),
    "MiSS": peft.MissConfig(target_modules=TARGETS, r=4),
    "OSF": peft.OSFConfig(target_modules=TARGETS),
    "PEANUT": peft.PeanutConfig(target_modules=TARGETS),
    "PSOFT": peft.PsoftConfig(target_modules=TARGETS, r=4),
    "PVeRA": peft.PveraConfig(target_modules=TARGETS),
    "RoAd": peft.RoadConfig(target_modules=["q_proj", "down_proj"], group_size=8),
    "Shadow": peft.ShadowConfig(task_type="CAUSAL_LM"),
    "SHiRA": peft.ShiraConfig(target_modules=TARGETS, r=1),
    "SuperTuning": peft.SupertuningConfig(target_modules=TARGETS),
    "TinyLoRA": peft.TinyLoraConfig(target_modules=TARGETS),
    "trainable tokens": peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=TOKENS),
    "UniLoRA": peft.UniLoraConfig(target_modules=TARGETS),
    "WaveFT": peft.WaveFTConfig(target_modules=TARGETS, n_frequency=10),
}
WITHOUT_REFERENCE = ("PiSSA", "OLoRA", "LoRA, bias")
# The adapters that allow no second one, with the beginning of the reason.
REFUSED = {
    "LoRA, bias": "bias='lora_only'",
    "aLoRA": "alora_invocation_tokens=",
    "AdaLoRA": "ADALORA, because",
    "prompt tuning": "PROMPT_TUNING has virtual tokens",
    "p-tuning": "P_TUNING has virtual tokens",
    "prefix tuning": "PREFIX_TUNING has virtual tokens",
    "Cartridge": "CARTRIDGE has virtual tokens",
    "KaSA": "`kasa_config`, which cuts",
    "Shadow": "SHADOW, because",
}
CASES = [(kind, critic) for kind in ADAPTERS for critic in CRITICS]
CASES += [pytest.param(kind, critic, marks=pytest.mark.slow) for kind in RARE for critic in ("none", "adapter")]


def base_folder(family, folder):
    family.build_model().save_pretrained(folder)
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def ids() -> torch.Tensor:
    return torch.tensor([[*range(20, 70), *END_OF_PROMPT], [*range(70, 122)]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits[:, -ids().size(1) :]


def trainer_of(family, folder, model, config=None, *, critic, **settings):
    kwargs = {} if config is None else {"peft_config": copy.deepcopy(config)}
    return sapo_trainer(
        family,
        folder,
        model=model,
        trainer_kwargs={"rollout_func": fixed_rollout(random_completions()), **kwargs},
        **{"critic": critic, "max_steps": 1, "num_mini_batches": 1, **settings},
    )


@pytest.mark.parametrize(("kind", "critic"), CASES)
@TEXT_FAMILY
def test_the_policy_starts_as_itself_and_loads_as_it_was_saved(family, kind, critic, tmp_path):
    base, config = base_folder(family, tmp_path / "base"), (ADAPTERS | RARE)[kind]
    settings = {"critic": critic, "beta": 0.0 if kind in WITHOUT_REFERENCE else 0.1}
    if critic == "adapter" and kind in REFUSED:
        with pytest.raises(ValueError, match=f'does not allow: {re.escape(REFUSED[kind])}.*"shared"'):
            trainer_of(family, tmp_path, loaded(base), config, **settings)
        return
    trainer = trainer_of(family, tmp_path, loaded(base), config, **settings)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if kind in IDENTITIES:
        # Two parts of a weight add up to it, or a product is 0, but for rounding.
        tolerance = 1e-4 if kind in ("PiSSA", "OLoRA", "HRA", "LoRA, orthogonal") else 0.0
        torch.testing.assert_close(logits(policy), logits(loaded(base)), rtol=0, atol=tolerance)
    else:
        set_seed(trainer.args.seed)
        torch.testing.assert_close(logits(policy), logits(get_peft_model(loaded(base), config)), rtol=0, atol=0)
    before = state_of(policy)
    trainer.train()
    if kind in IDENTITIES and settings["beta"]:
        assert logged(trainer, "kl") == [pytest.approx(0.0, abs=1e-6)]
    moved = before.keys() - unmoved(before, policy)
    assert any(".critic" not in name for name in moved)
    trained = logits(policy)
    assert (trained - logits(loaded(base))).abs().max() > 1e-4
    trainer.save_model()
    again = PeftModel.from_pretrained(loaded(base), tmp_path, is_trainable=critic == "adapter")
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-6)
    if critic == "none":
        return
    head = trainer.critic.value_head.eval()
    inputs = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    kwargs = {"policy": again} if critic == "adapter" else {}
    loaded_head = SegmentValueHead.from_pretrained(tmp_path / "critic", **kwargs).eval()
    if critic in ("shared", "ladder"):
        expected = head.state_dict()
        found = loaded_head.state_dict()
        assert found and found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        return
    if critic == "adapter":
        own = {name for name, _ in head.adapter.named_parameters()}
        assert own & moved
        base_weights = {name for name in before if ".critic" not in name and ".default" not in name}
        assert not base_weights & moved
    with torch.no_grad():
        torch.testing.assert_close(loaded_head(**inputs), head(**inputs), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-6)  # nor did the critic change it while loading


@pytest.mark.parametrize(
    "kind",
    [
        *sorted(ADAPTERS.keys() - REFUSED),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(RARE.keys() - REFUSED)),
    ],
)
@TEXT_FAMILY
def test_each_optimizer_moves_its_own_adapter(family, kind, tmp_path):
    for rates, still, moves in (
        ({"learning_rate": 0.0}, ".default", ".critic"),
        ({"critic_learning_rate": 0.0}, ".critic", ".default"),
    ):
        trainer = trainer_of(
            family,
            tmp_path,
            family.build_model(),
            (ADAPTERS | RARE)[kind],
            critic="adapter",
            beta=0.0,
            max_steps=2,
            **rates,
        )
        policy = trainer.accelerator.unwrap_model(trainer.model)
        before = state_of(policy)
        trainer.train()
        moved = before.keys() - unmoved(before, policy)
        assert moved and all(moves in name for name in moved), still


# All fields of the configurations that allow a second adapter. Each was decided on: see `critic_config`.
COPIED = set(
    # of all types
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision target_modules exclude_modules "
    "layers_to_transform layers_pattern fan_in_fan_out "
    # shapes and scales
    "r alpha lora_alpha rank_pattern alpha_pattern use_rslora use_dora lora_bias target_parameters use_qalora "
    "qalora_group_size use_bdlora trainable_token_indices scaling n_frequency n_frequency_pattern wavelet_family "
    "use_idwt proportional_parameters decompose_both decompose_factor use_effective_conv2d block_size "
    "block_size_pattern boft_block_size boft_block_num boft_n_butterfly_factor oft_block_size coft eps block_share "
    "use_cayley_neumann num_cayley_neumann_terms cayley_neumann_eps num_vectors vector_length topk delora_lambda "
    "lambda_pattern hybrid_r gralora_k apply_GS feedforward_modules stride_A num_B mini_r effective_rank "
    "target_svd_config depth act_fn psoft_alpha ab_svd_init psoft_svd psoft_svd_lowrank_niter psoft_orth psoft_mag_b "
    "psoft_mag_a sample_at_inference sparse very_sparse randlora_alpha variant group_size sparsity select_top u "
    "weight_tying token_indices theta_d_length decomposition_method init_scale para config_A_B config_C config_D_E "
    "sparse_rate regularization_alpha num_subspaces subspace_rank use_asa asa_target_subspaces init_warmup "
    "final_warmup mask_interval asa_importance_beta asa_uncertainty_beta asa_schedule_exponent use_dynamic_rank "
    "svd_threshold mask_type "
    # random numbers: projections that the adapters share must come from the same ones
    "init_weights projection_prng_key projection_seed random_seed random_loc_seed generator_seed proj_seed d_initial "
    "init_vector_bank_bound init_logits_std init_v_bound init_theta_d_bound init_ia3_weights "
    # dropout, off with `disable_dropout`
    "lora_dropout rank_dropout rank_dropout_scale module_dropout boft_dropout deft_dropout frod_dropout "
    "gralora_dropout hira_dropout miss_dropout psoft_dropout pvera_dropout randlora_dropout tinylora_dropout "
    "unilora_dropout vblora_dropout vera_dropout "
    # ways to run and to save
    "runtime_config megatron_config megatron_core velora_config monteclora_config save_projection "
    "save_only_topk_weights save_indices save_precomputed_indices runtime_offload_base_weight progressbar".split()
)
RESET = set(
    "init_lora_weights modules_to_save ensure_weight_tying layer_replication loftq_config eva_config corda_config "
    "lora_ga_config inference_mode".split()
)
REFUSED_FIELDS = {"bias", "alora_invocation_tokens", "kasa_config", "arrow_config"}
REFUSED_TYPES = {"ADALORA", "ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA"}


def test_every_field_of_every_configuration_is_decided_on():
    assert not (COPIED & RESET) | (COPIED & REFUSED_FIELDS)
    checked = 0
    for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value in REFUSED_TYPES or issubclass(config_class, peft.PromptLearningConfig):
            continue
        fields = {field.name for field in dataclasses.fields(config_class)}
        assert not fields - COPIED - RESET - REFUSED_FIELDS, kind
        checked += 1
    assert checked > 20


def test_what_is_copied_and_what_is_reset():
    own = lora(
        init_lora_weights="pissa",
        modules_to_save=["lm_head"],
        layer_replication=[(0, 2)],
        lora_dropout=0.25,
        rank_pattern={"q_proj": 2},
        inference_mode=True,
    )
    before = copy.deepcopy(own)
    copied = critic_config(own)
    differing = {
        field.name for field in dataclasses.fields(own) if getattr(own, field.name) != getattr(copied, field.name)
    }
    assert differing == {"init_lora_weights", "modules_to_save", "layer_replication", "inference_mode"}
    assert copied.init_lora_weights is True and own == before
    for start in (True, False, "gaussian", "orthogonal"):
        assert critic_config(lora(init_lora_weights=start)).init_lora_weights == start


class TestReference:
    @pytest.mark.parametrize(
        ("config", "error"),
        [
            (lora(init_lora_weights="pissa"), "init_lora_weights='pissa' moves a part.*beta=0.1.*Set beta=0.0"),
            (lora(init_lora_weights="olora"), "init_lora_weights='olora' moves a part.*beta=0.1.*Set beta=0.0"),
            (lora(bias="all"), "bias='all' trains biases of the base model, and with beta=0.1.*Set beta=0.0"),
        ],
    )
    @pytest.mark.parametrize("wrapped", [False, True])
    @TEXT_FAMILY
    def test_adapters_without_which_the_model_is_no_reference(self, family, config, error, wrapped, tmp_path):
        model = family.build_model()
        model, config = (get_peft_model(model, config), None) if wrapped else (model, config)
        with pytest.raises(ValueError, match=error):
            trainer_of(family, tmp_path, model, config, critic="none", beta=0.1)

    @TEXT_FAMILY
    def test_a_base_model_of_its_own_makes_pissa_comparable(self, family, tmp_path):
        base = base_folder(family, tmp_path / "base")
        policy = get_peft_model(loaded(base), lora(init_lora_weights="pissa_niter_4"))
        start = logits(policy)
        policy.peft_config["default"].init_lora_weights = True
        policy.save_pretrained(tmp_path / "start")
        policy.unload().save_pretrained(tmp_path / "rest")
        policy = PeftModel.from_pretrained(loaded(tmp_path / "rest"), tmp_path / "start", is_trainable=True)
        trainer = trainer_of(family, tmp_path / "run", policy, critic="adapter", beta=0.1)
        torch.testing.assert_close(logits(policy), start, rtol=0, atol=1e-5)
        trainer.train()
        assert logged(trainer, "kl") == [pytest.approx(0.0, abs=1e-6)]
        trainer.save_model()
        again = PeftModel.from_pretrained(loaded(tmp_path / "rest"), tmp_path / "run")
        torch.testing.assert_close(logits(again), logits(policy), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga"])
@TEXT_FAMILY
def test_a_start_that_cannot_be_repeated_cannot_be_loaded(family, start, tmp_path):
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' changes the base model.*use \"pissa\""):
        trainer_of(family, tmp_path, family.build_model(), lora(init_lora_weights=start), critic="none", beta=0.0)


@pytest.mark.parametrize(
    ("config", "settings", "error"),
    [
        (MultitaskPromptTuningConfig(**VIRTUAL, num_tasks=2), {}, "type MULTITASK_PROMPT_TUNING, which asks for the"),
        (XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters={}), {}, "type XLORA, which allows no cache"),
        (
            PrefixTuningConfig(**VIRTUAL),
            {"gradient_checkpointing": True},
            "drops the cache: set gradient_checkpointing=False",
        ),
        (PromptTuningConfig(**VIRTUAL), {"use_vllm": True}, "virtual tokens cannot be merged. Set use_vllm=False"),
    ],
)
@TEXT_FAMILY
def test_adapters_that_trl_cannot_train_are_an_error(family, config, settings, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        trainer_of(family, tmp_path, family.build_model(), config, critic="none", **settings)


@TEXT_FAMILY
def test_trained_tokens_of_a_tied_lm_head_are_an_error(family, tmp_path):
    model = family.build_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with pytest.raises(ValueError, match=r"`trainable_token_indices`, and its embeddings are also the LM head"):
        trainer_of(family, tmp_path, model, lora(trainable_token_indices=[30]), critic="none")


@pytest.mark.parametrize("critic", ["none", "adapter"])
@TEXT_FAMILY
def test_layers_are_replicated_once(family, critic, tmp_path):
    def build():
        set_seed(0)
        config = family.config(family.tokenizer).to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: config[name] for name in (*names, "initializer_range", "eos_token_id", "pad_token_id")}
        return LlamaForCausalLM(LlamaConfig(**sizes))  # Qwen's layers know their numbers

    config = lora(layer_replication=[(0, 2), (0, 2)])
    trainer = trainer_of(family, tmp_path, build(), config, critic=critic, beta=0.0)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    assert len(policy.get_base_model().model.layers) == 4
    assert torch.equal(logits(policy), logits(get_peft_model(build(), config)))
    before = state_of(policy)
    trainer.train()
    assert len(unmoved(before, policy)) < len(before)
    with pytest.raises(ValueError, match=r"has `layer_replication`, and with beta=0.1.*pass the base model"):
        trainer_of(family, tmp_path, get_peft_model(build(), config), critic="none", beta=0.1)


class TestNames:
    @pytest.mark.parametrize("critic", ["shared", "separate", "adapter"])
    @TEXT_FAMILY
    def test_a_policy_named_critic_is_an_error(self, family, critic, tmp_path):
        policy = get_peft_model(family.build_model(), lora(), adapter_name="critic")
        with pytest.raises(ValueError, match=f"adapter named 'critic', and critic='{critic}' needs this name"):
            trainer_of(family, tmp_path, policy, critic=critic, beta=0.0)
        if critic == "adapter":
            with pytest.raises(ValueError, match="own adapter is named 'critic', the name of the critic's"):
                SegmentValueHead.from_policy(policy, mode="adapter")

    @TEXT_FAMILY
    def test_without_a_learned_critic_the_name_is_free(self, family, tmp_path):
        policy = get_peft_model(family.build_model(), lora(), adapter_name="critic")
        trainer = trainer_of(family, tmp_path, policy, critic="none", beta=0.0)
        before = state_of(policy)
        trainer.train()
        assert len(unmoved(before, policy)) < len(before)


@pytest.mark.parametrize(
    "config",
    [
        lora(lora_dropout=0.5),
        LoHaConfig(target_modules=TARGETS, module_dropout=0.5),
        LoKrConfig(target_modules=TARGETS, module_dropout=0.5),
        BOFTConfig(target_modules=TARGETS, boft_block_size=4, boft_dropout=0.5),
        VeraConfig(target_modules=TARGETS, r=4, vera_dropout=0.5),
    ],
    ids=lambda config: config.peft_type.value,
)
@TEXT_FAMILY
def test_disable_dropout_reaches_both_adapters(family, config, tmp_path):
    inputs = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    for disabled in (True, False):
        trainer = trainer_of(
            family, tmp_path, family.build_model(), config, critic="adapter", beta=0.0, disable_dropout=disabled
        )
        policy, head = trainer.accelerator.unwrap_model(trainer.model), trainer.critic.value_head
        torch.manual_seed(0)
        for name, parameter in policy.named_parameters():
            if ".critic" in name or ".default" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        policy.train()
        head.train()
        with torch.no_grad():
            values = [head(**inputs) for _ in range(8)]
            outputs = [policy(**inputs).logits for _ in range(8)]
        assert all(torch.equal(values[0], other) for other in values) == disabled
        assert all(torch.equal(outputs[0], other) for other in outputs) == disabled


class TestVirtualTokens:
    CONFIGS = pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning", "prefix tuning"])

    @CONFIGS
    @TEXT_FAMILY
    @pytest.mark.parametrize("critic", ["shared", "ladder"])
    def test_log_probabilities_and_read_values_belong_to_the_responses_tokens(self, family, critic, kind, tmp_path):
        """Rows of a padded batch are compared with rows alone, by a loaded model."""
        base = base_folder(family, tmp_path / "base")
        for avoid_padding in (True, False):
            trainer = trainer_of(
                family, tmp_path, loaded(base), ADAPTERS[kind], critic=critic, beta=0.0, avoid_padding=avoid_padding
            )
            trainer.train()
            trainer.save_model()
            alone = PeftModel.from_pretrained(loaded(base), tmp_path).eval()
            head = trainer.critic.value_head
            prompts = trainer.tokenized_prompts(list(trainer.train_dataset.select(range(4))))
            batch = prompts.model_inputs(range(4), [[30, 31], [40], [50, 51, 52], [60]], 0, torch.device("cpu"))
            assert not batch["prompt_mask"].all() and not batch["completion_mask"].all()
            trainer.model.eval()
            with torch.no_grad():
                forward = trainer.policy_forward(trainer.model, batch)
                for row, mask in enumerate(batch["completion_mask"].bool()):
                    number = int(mask.sum())
                    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
                    tokens = torch.cat([prompt, batch["completion_ids"][row][mask]])[None]
                    outputs = alone(input_ids=tokens, output_hidden_states=True)
                    logps = outputs.logits[0, -number - 1 : -1].log_softmax(-1)
                    logps = logps.gather(1, tokens[0, -number:, None])[:, 0]
                    read = [outputs.hidden_states[depth][:, -tokens.size(1) :] for depth in head.depths(alone)]
                    values = head(hidden_states=read)[0, -number - 1 : -1]
                    torch.testing.assert_close(forward.logps[row][mask], logps, rtol=0, atol=2e-5)
                    torch.testing.assert_close(forward.values[row][mask], values, rtol=0, atol=2e-5)

    @CONFIGS
    @TEXT_FAMILY
    def test_generation_does_not_depend_on_padding(self, family, kind, tmp_path):
        base = base_folder(family, tmp_path / "base")
        trainer = trainer_of(family, tmp_path, loaded(base), ADAPTERS[kind], critic="none", beta=0.0)
        policy = trainer.accelerator.unwrap_model(trainer.model).eval()
        settings = GenerationConfig(
            max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
        )
        mask = torch.ones_like(ids())
        mask[1, :5] = 0
        together = policy.generate(input_ids=ids(), attention_mask=mask, generation_config=settings)
        trainer.save_model()
        plain = PeftModel.from_pretrained(loaded(base), tmp_path).eval()
        # Without a cache, PEFT gives the model the whole row at each token, with the virtual tokens in front.
        alone = plain.generate(input_ids=ids()[1:, 5:], generation_config=settings, use_cache=False)
        for padded, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(padded[1], expected[0], rtol=0, atol=2e-5)

    @pytest.mark.parametrize("config", [PromptTuningConfig(**VIRTUAL), PrefixTuningConfig(**VIRTUAL)])
    @pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
    def test_images_are_an_error(self, family, config, tmp_path):
        with pytest.raises(ValueError, match=r"virtual tokens move the columns.*qwen2_5_vl.*Use LoRA"):
            sapo_trainer(family, tmp_path, critic="none", trainer_kwargs={"peft_config": config})

    @TEXT_FAMILY
    def test_a_separate_critic_of_a_policy_with_them_starts_from_its_base_model(self, family, tmp_path):
        policy = get_peft_model(family.build_model(), PromptTuningConfig(**VIRTUAL))
        head = SegmentValueHead.from_policy(policy)
        own = state_of(head.backbone)
        expected = state_of(family.build_model().base_model)
        assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
        assert own and all(parameter.requires_grad for parameter in head.backbone.parameters())


@pytest.mark.parametrize("kind", [*IDENTITIES, "VB-LoRA"])
@TEXT_FAMILY
def test_a_separate_critic_of_a_trained_adapter_has_it_merged(family, kind, tmp_path):
    policy = get_peft_model(family.build_model(), copy.deepcopy(ADAPTERS[kind]))
    torch.manual_seed(0)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if kind in ("aLoRA", "LoRA, lora_bias"):  # acts on a part of a row; adds biases to layers without any
        with pytest.raises(ValueError, match='type LORA, cannot be merged.*`value_model`, or use `critic="shared"`'):
            SegmentValueHead.from_policy(policy)
        return
    head = SegmentValueHead.from_policy(policy).eval()
    with torch.no_grad():
        expected = policy.eval()(input_ids=ids(), output_hidden_states=True).hidden_states[-1]
        found = head.backbone(input_ids=ids()).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
