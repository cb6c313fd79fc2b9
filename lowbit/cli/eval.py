"""lowbit eval"""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.common import (
    BackendOption,
    DeviceMapOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    TrustOption,
    checked_dtype,
    console,
    default_device_map,
    one_model,
    print_json,
    progress,
    quiet_transformers,
    table,
)  # fmt: skip


def evaluate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with: KL divergence and top-1 agreement.", show_default=False)
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            help="A text file, 'stdlib' (held-out Python modules), 'wikitext2', or org/name[:config[:split[:column]]]."
        ),
    ] = "stdlib",
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window, at most the model's context.")] = 2048,
    num_tokens: Annotated[
        int | None, typer.Option(min=2, help="Use the first tokens only.", show_default=False)
    ] = None,
    dtype: DtypeOption = "auto",
    device_map: DeviceMapOption = None,
    backend: BackendOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
):
    """Measure perplexity, and KL divergence to a reference model, on the same tokens."""
    from lowbit.calibration.data import token_stream
    from lowbit.eval import evaluate as measure
    from lowbit.eval.compare import starts_with_bos
    from lowbit.generation.stream import load_tokenizer
    from lowbit.hf import load

    name, dtype = one_model(model, model_option), checked_dtype(dtype)
    quiet_transformers()
    tokenizer = load_tokenizer(name, trust_remote_code)
    stream = token_stream(tokenizer, dataset, num_tokens)
    options = {"device_map": default_device_map(device_map), "dtype": dtype, "trust_remote_code": trust_remote_code}
    loaded = load(name, backend=backend, **options)
    other = load(reference, **options) if reference is not None else None
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    with progress("evaluating", 1, quiet=json) as advance:
        done = measure(
            loaded, stream, reference=other, seqlen=seqlen, bos=bos, on_window=lambda _, total: advance(1 / total)
        )
    if json:
        print_json({"model": name, "reference": reference, "dataset": dataset, **done.to_dict()})
        return
    rows = table("", *(Path(which).name for which in (name, reference) if which is not None))
    if reference is None:
        rows.add_row("perplexity", f"{done.perplexity:.3f}")
    else:
        rows.add_row("perplexity", f"{done.perplexity:.3f}", f"{done.reference_perplexity:.3f}")
        rows.add_row("mean KL divergence (nats)", f"{done.kl_mean:.5f}", "0")
        rows.add_row("99th percentile KL", f"{done.kl_p99:.5f}", "0")
        rows.add_row("top-1 agreement", f"{done.top1_agreement:.2%}", "100%")
    console.print(rows)
    against = "" if reference is None else f" against {reference}"
    console.print(f"{name}{against}: {done.tokens:,} tokens of {dataset} in windows of {done.seqlen}")
