"""The release gate: what the files of a folder say (verification/), and what the model in it does when it runs."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lowbit.discovery import require_language_head
from lowbit.errors import InputError, LowbitError, first_line
from lowbit.eval.compare import evaluate, starts_with_bos
from lowbit.folders.locate import load_config, resolve
from lowbit.folders.opened import stored_weights
from lowbit.hf import load
from lowbit.options import SourceOptions, VerifyOptions, takes_options
from lowbit.text.datasets import token_stream
from lowbit.verification.checks import static_checks
from lowbit.verification.folder import Check

_TOKENS, _NEW_TOKENS = 256, 16
# Mean KL to the reference, in nats, beyond which nobody should publish a model of so few bits. Unlike weights
# (verification/tolerance.py) it is not compared with that of a rounded model, which may be as useless: whether a model
# is damaged or merely too coarse makes no difference to who runs it
_LARGEST_KL = {16: 0.1, 8: 0.1, 6: 0.1, 5: 0.2, 4: 0.5, 3: 2.0, 2: 5.0}


@dataclass(frozen=True)
class Verification:
    """All checks of a folder, in the order they were made. It passes if none failed."""

    folder: str
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[str]:
        return [f"{check.name}: {check.detail}" for check in self.checks if check.ok is False]

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict:
        checks = [asdict(check) for check in self.checks]
        return {"folder": self.folder, "ok": self.ok, "checks": checks, "failures": self.failures}


@takes_options
def verify(
    folder: str | Path,
    reference: str | Path | None = None,
    *,
    checks: VerifyOptions,
    source: SourceOptions,
    on_check: Callable[[Check], None] | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Verification:
    """Is this quantized folder fit to be published?

    Args:
        folder: A folder, or a Hub id.
        reference: The model it was made from: every tensor is compared.
        on_check: Called with each check that is done.
        on_tensor: Called with the numbers of tensors that are compared, and of all.

    Returns:
        All checks, and whether the folder passes.

    Raises:
        InputError: The folder or the reference does not exist.
    """
    path = resolve(folder, source.revision)
    original = None if reference is None else resolve(reference)
    trust = source.trust_remote_code
    done: list[Check] = []

    def made() -> Iterator[Check]:
        yield from static_checks(
            path, original, max_unquantized=checks.max_unquantized, trust_remote_code=trust,
            on_tensor=on_tensor or _silent,
        )  # fmt: skip
        if checks.run and all(check.ok is not False for check in done):
            yield from _running_checks(path, original, checks.device_map, trust)
        elif checks.run:
            yield Check("generates", None, "not run: the files have to be right first")

    for check in made():
        done.append(check)
        if on_check:
            on_check(check)
    return Verification(str(folder), tuple(done))


def _silent(done: int, total: int) -> None:
    pass


def _running_checks(path: Path, source: Path | None, device_map, trust_remote_code: bool) -> Iterator[Check]:
    options = {"device_map": device_map, "trust_remote_code": trust_remote_code}
    try:
        require_language_head(load_config(path, trust_remote_code), path, trust_remote_code)
    except InputError as error:
        yield Check("generates", None, str(error))
        return
    try:
        model = load(path, **options)
        yield _canary(model)
    except LowbitError as error:
        yield Check("generates", False, str(error))
        return
    if source is None:
        yield Check("near the reference", None, "no --reference was given")
        return
    try:
        original = load(source, **options)
    except InputError as error:  # such as tensors that no module has: what is checked names them, it may not
        yield Check("near the reference", None, f"the reference does not load: {error}")
        return
    ids, bos = some_tokens(path, model, trust_remote_code)
    quality = evaluate(model, ids, reference=original, bos=bos)
    weights = stored_weights(path).weights.values()
    limit = _LARGEST_KL[min((weight.scheme.bits for weight in weights), default=16)]
    measured = (
        f"mean KL {quality.kl_mean:.4f} nats (expected below {limit}), top-1 agreement {quality.top1_agreement:.1%}"
    )
    yield Check("near the reference", quality.kl_mean < limit, f"{measured}, {quality.tokens} tokens")


def _canary(model) -> Check:
    """A few greedy tokens from a fixed beginning: finite logits, tokens of the vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings
    start = torch.arange(1, 9).remainder(vocabulary).unsqueeze(0).to(model.device)
    with torch.inference_mode():
        logits = model(input_ids=start, use_cache=False).logits
        if not torch.isfinite(logits).all():
            return Check("generates", False, "the model gives NaN or infinite logits")
        try:
            made = model.generate(
                input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=_NEW_TOKENS, do_sample=False
            )
        except Exception as error:  # of any model's own code
            return Check("generates", False, f"generation fails: {first_line(error)}")
    return Check("generates", True, f"{made.shape[1] - start.shape[1]} greedy tokens")


def some_tokens(
    path: Path, model, trust_remote_code: bool, dataset: str = "stdlib", count: int = _TOKENS
) -> tuple[torch.Tensor, int | None]:
    """Held-out text where the folder has a tokenizer; else tokens at random, which compare two models as well.

    Returns:
        int64 [count], and the token that windows of it start with, None for none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception:  # static_checks has said what is wrong with a tokenizer that is there
        vocabulary = model.get_input_embeddings().num_embeddings
        return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0)), None
    bos = tokenizer.bos_token_id if starts_with_bos(tokenizer) else None
    return token_stream(tokenizer, dataset, count), bos
