"""Serving rules: each row refuses what its engine refuses, and says which module, what it has and what is needed."""

import re
from dataclasses import replace

import pytest
import torch
from folders import ROOT
from models import ARCHITECTURES, tiny_config

from lowbit.discovery import choose, find_sites, skeleton
from lowbit.numerics.scheme import Recipe, Scheme
from lowbit.serving import COLUMN, ROW, RULES, Module, fused_units, modules_of, splits, verdicts

G128 = Scheme()
PLAIN = Module(G128, 4096, 4096)
TABLE = Module(G128, 50000, 4096, embedding=True)
EXPERT = Module(G128, 4096, 2048, split=COLUMN, merged=2, expert=True)


def verdict(engine, format, modules, **options):
    (found,) = [v for v in verdicts(format, modules, **options) if v.engine == engine]
    return found


def scheme(name):
    return Scheme.parse(name)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.engine}-{rule.format}")
def test_every_engine_takes_the_default(rule):
    """4 bits, symmetric, groups of 128, in natural order: what every row agrees on, dense and in experts."""
    found = verdict(rule.engine, rule.format, {"a": PLAIN, "b": EXPERT})
    assert found.ok and found.reason is None and set(found.tensor_parallel) == set(rule.ranks)
    assert not any(found.tensor_parallel.values())


CT, GPTQ, AWQ = "compressed-tensors", "gptq", "awq"


@pytest.mark.parametrize(
    ("engine", "format", "module", "needed"),
    [
        ("transformers", CT, replace(PLAIN, scheme=scheme("W4A16_ASYM")), "not asymmetric"),
        ("transformers", CT, replace(EXPERT, fused=True), "tensors of each expert"),
        ("vLLM", CT, replace(PLAIN, act_order=True), "natural order"),
        ("vLLM", CT, replace(EXPERT, fused=True), "tensors of each expert"),
        ("vLLM", CT, replace(EXPERT, scheme=scheme("W2A16-CHANNEL")), "Humming needs group_size 16 or"),
        ("vLLM", CT, replace(EXPERT, scheme=scheme("W4A16-CHANNEL"), in_features=2112), "multiple of 128, found 2112"),
        ("vLLM", CT, replace(EXPERT, scheme=scheme("W4A16_ASYM"), out_features=4104), "2052 out_features"),
        ("SGLang", CT, replace(PLAIN, scheme=scheme("W3A16")), "4 or 8 bits where weights are symmetric"),
        ("SGLang", CT, replace(PLAIN, scheme=scheme("W8A16_ASYM")), "4 bits where weights are asymmetric"),
        ("SGLang", CT, replace(PLAIN, scheme=scheme("W4A16-G256")), "group_size -1 or 32 or 64 or 128"),
        ("SGLang", CT, replace(PLAIN, scheme=scheme("W4A16-G64"), in_features=4160), "multiple of 128, found 4160"),
        ("SGLang", CT, replace(PLAIN, out_features=1000), "out_features a multiple of 64, found 1000"),
        ("SGLang", CT, replace(EXPERT, scheme=scheme("W4A16_ASYM")), "not asymmetric"),
        ("GPTQModel", GPTQ, replace(EXPERT, fused=True), "tensors of each expert"),
        ("vLLM", GPTQ, replace(PLAIN, scheme=scheme("W2A16")), "4 or 8 bits"),
        ("vLLM", GPTQ, replace(PLAIN, scheme=scheme("W4A16_ASYM")), "not asymmetric"),
        ("vLLM", GPTQ, replace(PLAIN, act_order=True), "natural order"),
        ("vLLM", GPTQ, replace(PLAIN, scheme=scheme("W4A16-G16")), "group_size -1 or 32"),
        ("vLLM", GPTQ, replace(EXPERT, scheme=scheme("W4A16-G16")), "WNA16 needs group_size 32"),
        ("SGLang", GPTQ, replace(PLAIN, scheme=scheme("W4A16_ASYM")), "not asymmetric"),
        ("SGLang", GPTQ, replace(PLAIN, scheme=scheme("W3A16")), "4 or 8 bits"),
        ("GPTQModel", AWQ, replace(PLAIN, scheme=scheme("W4A16-G256")), "group_size"),
        ("vLLM", AWQ, replace(PLAIN, scheme=scheme("W8A16")), "4 bits"),
        ("vLLM", AWQ, replace(PLAIN, scheme=scheme("W4A16-G16"), out_features=4100), "multiple of 8, found 4100"),
        ("SGLang", AWQ, replace(PLAIN, scheme=scheme("W8A16_ASYM")), "4 bits"),
        ("vLLM", CT, replace(PLAIN, scheme=scheme("W8A8-G128")), "W8A8Int8 needs group_size -1"),
        ("vLLM", CT, replace(PLAIN, scheme=scheme("W8A8_ASYM")), "W8A8Int8 needs weights that are not asymmetric"),
        ("vLLM", CT, replace(PLAIN, scheme=scheme("W4A8-STATIC")), "8 bits where weights are symmetric"),
        ("vLLM", CT, replace(EXPERT, scheme=scheme("W8A8")), "symmetric dynamic inputs, needed: inputs in floating"),
        ("lowbit", CT, replace(EXPERT, scheme=scheme("W8A8-STATIC")), "asymmetric static inputs, needed: inputs in"),
        ("SGLang", CT, replace(PLAIN, scheme=scheme("W4A8")), "W8A8Int8 needs 8 bits"),
        ("vLLM", CT, replace(TABLE, scheme=scheme("W3A16")), "EmbeddingWNA16Int needs 2 or 4 or 8 bits"),
        ("vLLM", CT, replace(TABLE, scheme=scheme("W4A16_ASYM")), "needs weights that are not asymmetric"),
        ("vLLM", CT, replace(TABLE, scheme=scheme("W4A16-CHANNEL"), in_features=4100), "4100 codes of 4 bits"),
        ("vLLM", CT, replace(TABLE, tied=True), "the table of the output embedding too, needed: a head of its own"),
        ("SGLang", CT, TABLE, "is an embedding, needed: a dense one"),
        ("transformers", CT, replace(TABLE, scheme=scheme("W8A16")), "fine is W4A16-G128, needed: one scheme for all"),
    ],
)  # fmt: skip
def test_refused(engine, format, module, needed):
    """Of two modules the one that does not fit is named, with its scheme and shape."""
    name = "model.layers.7.mlp.down_proj"
    reason = verdict(engine, format, {"fine": PLAIN, name: module}).reason
    assert reason.startswith(f"{name} ({module.scheme.name}, {module.out_features}x{module.in_features})"), reason
    assert needed in reason and "more" not in reason and "\n" not in reason


@pytest.mark.parametrize(
    ("engine", "format", "module"),
    [
        ("lowbit", CT, replace(PLAIN, scheme=scheme("W3A16_ASYM-G16"), out_features=17)),
        ("lowbit", CT, replace(EXPERT, fused=True)),
        ("vLLM", CT, replace(PLAIN, scheme=scheme("W3A16_ASYM-G16"), out_features=17)),
        ("vLLM", CT, replace(PLAIN, scheme=scheme("W4A16-CHANNEL"), act_order=True)),
        ("vLLM", CT, replace(EXPERT, scheme=scheme("W4A16-CHANNEL"))),
        ("SGLang", CT, replace(EXPERT, in_features=2112, split=ROW)),
        ("lowbit", CT, replace(PLAIN, scheme=scheme("W3A8_ASYM-G16-STATIC"), out_features=17)),
        ("transformers", CT, replace(PLAIN, scheme=scheme("W4A8-CHANNEL-DYNAMIC_ASYM"))),
        ("vLLM", CT, replace(PLAIN, scheme=scheme("W8A8"), out_features=17, in_features=33)),
        ("vLLM", CT, replace(PLAIN, scheme=scheme("W8A8-STATIC"))),
        ("vLLM", CT, replace(PLAIN, scheme=scheme("W4A8"))),
        ("SGLang", CT, replace(PLAIN, scheme=scheme("W8A8-STATIC_SYM"))),
        ("SGLang", GPTQ, replace(PLAIN, act_order=True)),
        ("GPTQModel", GPTQ, replace(PLAIN, scheme=scheme("W2A16_ASYM-G1024"), act_order=True)),
        ("lowbit", CT, replace(TABLE, scheme=scheme("W3A16_ASYM"), tied=True)),
        ("transformers", CT, replace(TABLE, scheme=scheme("W3A16_ASYM"), tied=True)),
        ("vLLM", CT, replace(TABLE, scheme=scheme("W2A16-CHANNEL"), in_features=4112)),
    ],
)
def test_taken(engine, format, module):
    assert verdict(engine, format, {"a": module}).ok


def test_the_number_of_other_refusals_is_told():
    modules = {str(number): replace(PLAIN, scheme=scheme("W2A16")) for number in range(5)}
    assert verdict("SGLang", CT, modules).reason.endswith("(and 4 more)")


# Units that engines merge


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_a_unit_has_one_scheme(engine):
    modules = {"q": PLAIN, "k": replace(PLAIN, scheme=scheme("W8A16")), "v": PLAIN, "o": PLAIN}
    reason = verdict(engine, CT, modules, units=[("q", "k", "v")]).reason
    assert "q is W4A16-G128" in reason or "v is W4A16-G128" in reason
    assert "k is W8A16-G128" in reason and "one scheme" in reason
    assert verdict(engine, CT, modules).ok and verdict("lowbit", CT, modules, units=[("q", "k", "v")]).ok


def test_a_unit_is_quantized_or_not():
    modules = {"gate": PLAIN}
    reason = verdict("vLLM", CT, modules, left=["up"], units=[("gate", "up")]).reason
    assert reason.startswith("up is dense and gate is not")
    assert verdict("vLLM", CT, modules, left=["up", "other"], units=[("other", "up")]).ok


def test_experts_have_one_scheme():
    modules = {"gate_up": EXPERT, "down": replace(EXPERT, scheme=scheme("W8A16"), split=ROW, merged=1)}
    assert "one scheme" in verdict("vLLM", CT, modules, units=[("gate_up", "down")]).reason


def test_merged_modules_are_judged_by_their_joint_size():
    """SGLang's Marlin wants multiples of 64: 96 + 32 are, alone they are not. Zero points are joined in whole words."""
    modules = {"q": replace(PLAIN, out_features=96), "k": replace(PLAIN, out_features=32)}
    assert "found 96" in verdict("SGLang", CT, modules).reason
    assert verdict("SGLang", CT, modules, units=[("q", "k")]).ok
    modules = {name: replace(PLAIN, scheme=scheme("W3A16_ASYM"), out_features=48) for name in "qk"}
    assert verdict("vLLM", CT, modules).ok
    reason = verdict("vLLM", CT, modules, units=[("q", "k")]).reason
    assert "parts of 48 out_features" in reason and "a multiple of 32" in reason


# Tensor parallelism


@pytest.mark.parametrize(
    ("module", "sizes", "needed"),
    [
        (replace(PLAIN, split=ROW), {2, 4, 8}, None),
        (replace(PLAIN, in_features=512, split=ROW), {2, 4}, "64 in_features on each of 8 ranks, needed: whole groups"),
        (replace(PLAIN, in_features=384, split=ROW), set(), "has 192 in_features"),
        (replace(PLAIN, in_features=384, scheme=scheme("W4A16-CHANNEL"), split=ROW), {2, 4, 8}, None),
        (replace(PLAIN, in_features=96, scheme=scheme("W3A16-CHANNEL"), split=ROW), set(), "parts of 48 in_features"),
        (replace(PLAIN, out_features=100, split=COLUMN), {2, 4}, "that 8 ranks can share equally"),
        (replace(PLAIN, out_features=48, scheme=scheme("W4A16_ASYM"), split=COLUMN), {2}, "whole int32 words"),
        (replace(PLAIN, out_features=100), {2, 4, 8}, None),
        (replace(EXPERT, out_features=2 * 12), {2, 4}, "share equally"),
    ],
)
def test_tensor_parallel(module, sizes, needed):
    found = verdict("vLLM", CT, {"a": module}).tensor_parallel
    assert found[1] is None and {size for size in (2, 4, 8) if found[size] is None} == sizes
    assert needed is None or any(needed in reason for reason in found.values() if reason)


def test_the_part_of_a_rank_has_to_fit_the_kernel():
    found = verdict("SGLang", CT, {"a": replace(PLAIN, out_features=256, split=COLUMN)}).tensor_parallel
    assert found[4] is None and "on each of 8 ranks: Marlin needs out_features a multiple of 64, found 32" in found[8]


# What else a verdict says


def test_kernels_and_capability():
    modules = {"a": PLAIN, "b": PLAIN, "c": replace(PLAIN, scheme=scheme("W3A16"))}
    found = verdict("vLLM", CT, modules)
    assert found.kernels == {"Marlin": 2, "Humming": 1} and found.capability == (7, 5) and not found.run
    assert verdict("SGLang", CT, {"a": PLAIN}).capability == (8, 0)
    assert verdict("lowbit", CT, modules).capability is None
    assert verdict("SGLang", CT, {"a": PLAIN}, capability=(8, 0)).ok
    reason = verdict("SGLang", CT, {"a": PLAIN}, capability=(7, 5)).reason
    assert "needs compute capability 8.0, found 7.5" in reason


def test_notes():
    assert "float32 is converted" in verdict("vLLM", CT, {"a": PLAIN}, dtype="float32").note
    assert verdict("vLLM", CT, {"a": PLAIN}).note == ""
    assert "CompressedTensorsConfig(dequantize=True)" in verdict("transformers", CT, {"a": PLAIN}).note


# The model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return skeleton(tiny_config(request.param), dtype=torch.bfloat16)


def test_splits_are_those_of_the_plan(model):
    """The rule for models without a plan, where transformers has one: it says the same."""
    sites = find_sites(model)
    head = "lm_head"  # has no parent: the rule says nothing about it
    planned = {name: split for name, split in splits(model, sites).items() if name != head}
    model._tp_plan, plan = {}, model._tp_plan
    try:
        ruled = {name: split for name, split in splits(model, sites).items() if name != head}
    finally:
        model._tp_plan = plan
    if model.config.model_type == "phi3":  # defines its output projection first, so the rule alone would be wrong
        attention = "model.layers.0.self_attn"
        assert (planned[f"{attention}.o_proj"], planned[f"{attention}.qkv_proj"]) == (ROW, COLUMN)
    else:
        assert planned == ruled
    assert {COLUMN, ROW} <= set(planned.values())


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama", ["self_attn: q_proj k_proj v_proj", "mlp: gate_proj up_proj"]),
        ("phi3", []),
        ("gpt_neox", []),
        ("qwen2_moe", ["self_attn: q_proj k_proj v_proj", "mlp.shared_expert: gate_proj up_proj",
                       "mlp.experts: gate_up_proj down_proj"]),
        ("gpt_oss", ["self_attn: q_proj k_proj v_proj", "mlp.experts: gate_up_proj down_proj"]),
    ],
)  # fmt: skip
def test_fused_units(name, parts):
    model = skeleton(tiny_config(name), dtype=torch.bfloat16)
    described = []
    for unit in fused_units(model, find_sites(model)):
        parent, leaves = unit[0].rpartition(".")[0], [name.rpartition(".")[2] for name in unit]
        described.append(f"{parent.removeprefix('model.layers.')}: {' '.join(leaves)}")
    assert sorted(described) == sorted(f"{layer}.{part}" for part in parts for layer in range(2))


def test_units_end_where_the_model_cannot_go_on():
    """A model that wants numbers, or something else than tokens, is no error."""
    model = skeleton(tiny_config("llama"), dtype=torch.bfloat16)
    model.model.layers[1].forward = lambda *args, **kwargs: torch.zeros(1, device="meta").item()
    units = fused_units(model, find_sites(model))
    assert [unit[0] for unit in units] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"]


def test_modules_of_a_model(model):
    chosen, _ = choose(model, Recipe(Scheme(4, 32)))
    modules = modules_of(model, chosen)
    assert list(modules) == [site.module for site, _ in chosen.values()]
    stored_fused = model.config.model_type == "gpt_oss"
    for site, fitted in chosen.values():
        module = modules[site.module]
        assert (module.out_features, module.in_features) == (site.out_features, site.in_features)
        assert module.scheme == fitted and module.expert == (site.kind == "experts")
        assert module.fused == (module.expert and stored_fused)
        assert module.merged == (2 if "gate_up_proj" in site.module and module.expert and not stored_fused else 1)


# docs/serving.md


def inputs(activations) -> str:
    return f"{'static' if activations.static else 'dynamic'} {'symmetric' if activations.sym else 'asymmetric'}"


def described(kernel) -> str:
    said = [f"{kernel.name}:".lstrip(":")] if kernel.name else []
    for bits, kind in ((kernel.sym, "symmetric"), (kernel.asym, "asymmetric")):
        said += [f"{', '.join(map(str, bits))} bits {kind};"] if bits else []
    if kernel.groups is not None:
        said.append(f"groups of {', '.join(map(str, kernel.groups)).replace('-1', 'a channel')};")
    for side in ("in_features", "out_features"):
        multiple = getattr(kernel, side.removesuffix("features") + "multiple")
        said += [f"{side} % {multiple} == 0;"] if multiple > 1 else []
    said += [f"hidden size % {kernel.hidden} == 0;"] if kernel.hidden > 1 else []
    integers = [a for a in kernel.activations if a is not None]
    also = "" if None not in kernel.activations else " too"
    kinds = "any" if len(integers) == 4 else ", ".join(map(inputs, integers))
    said += [f"int8 inputs{also} ({kinds});"] if integers else []
    return " ".join(said).rstrip(";")


def table() -> str:
    lines = ["| engine | format | linears | experts | `desc_act` | GPUs | known from |", "|---" * 7 + "|"]
    for rule in RULES:
        kernels = ["<br>".join(map(described, kernels)) for kernels in (rule.linear, rule.experts)]
        cells = [
            f"{rule.engine} {rule.version}".replace("lowbit this", "lowbit"), rule.format, kernels[0],
            "the same" if kernels[0] == kernels[1] else kernels[1], "yes" if rule.act_order else "no",
            ", ".join(map(str, rule.ranks)), "run" if rule.run else "read",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert table() in page, f"docs/serving.md needs this table:\n{table()}"


def test_code_of_the_page_runs(capsys):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, {})
    assert "vLLM 0.33 yes" in capsys.readouterr().out
