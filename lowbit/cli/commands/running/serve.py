"""lowbit serve"""

from pathlib import Path

from lowbit.cli.commands.running.generate import PREFILL_CHUNK, RunningOptions
from lowbit.cli.common import HeadFlags, ModelArgument, ModelOption, one_model
from lowbit.cli.terminal import notes
from lowbit.cli.together import is_first, one_voice, refuse_together
from lowbit.errors import UsageError
from lowbit.options import BatchingOptions, LimitOptions, ListenOptions
from lowbit.system.read_ahead import read_ahead


def serve(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    *,
    listen: ListenOptions,
    limits: LimitOptions,
    batching: BatchingOptions,
    running: RunningOptions,
    head: HeadFlags,
):
    """Serve a model by OpenAI's API, with transformers' server: chat completions, completions, responses. It ends what
    runs and leaves on Ctrl-C."""
    name, head_scheme = one_model(model, model_option), head.scheme()
    running.check()
    _check_batching(batching, running)
    if batching.continuous_batching:
        refuse_together("--continuous-batching")
    from lowbit.server.run import answers_of, api_key, application, bind, check_packages, run, url

    check_packages()
    if not is_first():
        _follow(name, head_scheme, running)
        return
    key = api_key(listen.api_key)
    with bind(listen.host, listen.port, key) as bound:  # a port that is taken is told before the model is loaded
        from lowbit.server.guard import Door

        read_ahead(Path(name))  # while all else is imported
        session = running.start(name, head_scheme)
        shown = listen.name or (Path(name).resolve().name if Path(name).is_dir() else name)
        address = url(bound)
        door = Door(key, local=address.startswith(("http://127.", "http://[::1]")))
        answers = answers_of(session, limits, batching, running.prefill_chunk or PREFILL_CHUNK)
        app = application(session, answers, shown, listen, limits, door)
        page = f"; chat at {address}/" if listen.ui else ""
        run(app, bound, limits, lambda: notes.print(f"{shown} is served at {address}/v1{page} (Ctrl-C ends it)"))
    answers.end()
    notes.print("the server has ended")


def _follow(name: str, head_scheme: str | None, running: RunningOptions) -> None:
    with one_voice():
        session = running.start(name, head_scheme)
        from lowbit.server.together import follow

        follow(session)


def _check_batching(batching: BatchingOptions, running: RunningOptions) -> None:
    """Raises UsageError."""
    others = {
        "--kv-cache int8": running.kv_cache == "int8", "--compile": running.compile, "--assistant": running.assistant,
        "--prompt-lookup": running.prompt_lookup, "--prefill-chunk": running.prefill_chunk,
    }  # fmt: skip
    for flag, given in others.items():
        if batching.continuous_batching and given:
            raise UsageError(f"{flag} does not go with --continuous-batching, which has a cache and a loop of its own")
    sizes = {name: value for name, value in vars(batching).items() if name.startswith("cb_") and value is not None}
    if sizes and not batching.continuous_batching:
        raise UsageError(f"--{next(iter(sizes)).replace('_', '-')} is a size of --continuous-batching: pass that too")
