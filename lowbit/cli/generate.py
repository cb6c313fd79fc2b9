"""lowbit generate"""

import sys
from typing import Annotated

import typer

from lowbit.cli.common import (
    BackendOption,
    DeviceMapOption,
    DtypeOption,
    JsonOption,
    KvCacheOption,
    LmHeadOption,
    LmHeadSchemeOption,
    ModelArgument,
    ModelOption,
    RevisionOption,
    TrustOption,
    checked_dtype,
    checked_kv_cache,
    default_device_map,
    head_scheme,
    notes,
    one_model,
    print_json,
    quiet_transformers,
)  # fmt: skip
from lowbit.errors import InputError

NewTokensOption = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 is greedy; higher is more random.")]
TopPOption = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Sample from the most likely tokens that make up this probability.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.", show_default=False)
]


def generate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    prompt: Annotated[
        str,
        typer.Option("--prompt", "-p", help="Text to continue; - reads it from standard input.", show_default=False),
    ] = ...,
    max_new_tokens: NewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    dtype: DtypeOption = "auto",
    device_map: DeviceMapOption = None,
    backend: BackendOption = None,
    lm_head: LmHeadOption = False,
    lm_head_scheme: LmHeadSchemeOption = None,
    kv_cache: KvCacheOption = "full",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
):
    """Complete a prompt. The text streams to standard output, the statistics to standard error."""
    from lowbit.generation import open_session

    name, dtype = one_model(model, model_option), checked_dtype(dtype)
    try:
        prompt = sys.stdin.read() if prompt == "-" else prompt
        prompt.encode()
    except UnicodeError:
        raise InputError("the prompt is not UTF-8 text") from None
    quiet_transformers()
    session = open_session(
        name,
        dtype=dtype,
        device_map=default_device_map(device_map),
        backend=backend,
        lm_head=head_scheme(lm_head, lm_head_scheme),
        kv_cache=checked_kv_cache(kv_cache),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )

    def show(text):
        sys.stdout.write(text)
        sys.stdout.flush()

    if not json:
        show(prompt)
    result = session.generate(
        session.encode(prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        on_text=(lambda text: None) if json else show,
    )
    if json:
        print_json(
            {"model": name, "prompt": prompt, "text": result.text, "tokens": result.tokens,
             "prompt_tokens": result.prompt_tokens, "seconds": result.seconds}
        )  # fmt: skip
    else:
        show("\n")
        notes.print(f"[{result.tokens} tokens, {result.tokens_per_second:.1f} per second]", markup=False)
    if result.interrupted:
        raise typer.Exit(1)
