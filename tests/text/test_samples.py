"""Calibration samples from token ids, and packed from texts."""

import os
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from folders import ROOT, VOCABULARY, save_chat_model
from safetensors.torch import save_file
from texts import make_texts, write_texts
from transformers import AutoTokenizer

from lowbit.errors import InputError, UsageError
from lowbit.text.samples import Samples

BOS, EOS = 1, 2


def ids_of(rows: int = 6, length: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def stored(tmp_path, kind: str, ids: torch.Tensor):
    """`ids` as each kind of data set that is token ids."""
    if kind == "npy":
        np.save(tmp_path / "ids.npy", ids.to(torch.int32).numpy())
        return tmp_path / "ids.npy"
    if kind.startswith("safetensors"):
        tensors = {"ids": ids} if kind.endswith("one") else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        save_file(tensors, tmp_path / "ids.safetensors")
        return str(tmp_path / "ids.safetensors")
    if kind == "big-endian array":
        return ids.numpy().astype(">i4")
    return {"tensor": ids, "list": ids.tolist(), "tensors": list(ids), "uint16": ids.to(torch.uint16)}[kind]


def pieces(samples: Samples) -> list[list[int]]:
    """What the stream has between its end-of-text tokens; behind the last one, what is cut off."""
    found = [[]]
    for token in samples.input_ids.flatten().tolist():
        if token == EOS:
            found.append([])
        else:
            found[-1].append(token)
    return found


# Ids


@pytest.mark.parametrize(
    "kind",
    ["tensor", "list", "tensors", "uint16", "big-endian array", "npy", "safetensors of one", "safetensors of two"],
)
def test_ids_are_used_as_they_are(samples_of, tmp_path, kind):
    samples = samples_of(stored(tmp_path, kind, ids_of()), seqlen=2048)
    assert samples.input_ids.dtype == torch.int64 and samples.input_ids.is_contiguous()
    assert torch.equal(samples.input_ids, ids_of()) and samples.tokens == 72
    assert samples_of.said == []


def test_ids_are_limited_aloud(samples_of):
    samples = samples_of(ids_of(), num_samples=4, context=10)
    assert torch.equal(samples.input_ids, ids_of()[:4, :10])
    assert len(samples_of.said) == 2 and "4 of 6 samples" in " ".join(samples_of.said)


def test_samples_are_a_copy_of_their_own(samples_of):
    ids = ids_of()
    samples = samples_of(ids)
    before = samples.digest
    ids.zero_()
    assert samples.digest == before


def test_digest_is_of_shape_and_ids():
    samples = Samples(ids_of(), "a")
    assert len(samples.digest) == 64
    assert samples.digest == Samples(ids_of(), "b").digest == Samples(ids_of().T.contiguous().T, "c").digest
    other = ids_of()
    other[5, 11] += 1
    assert len({samples.digest, Samples(other, "a").digest, Samples(ids_of().view(12, 6), "a").digest}) == 3


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (ids_of().float(), ["float32", "integers"]),
        (ids_of().bool(), ["bool", "integers"]),
        (ids_of()[0], ["[12]", "[samples, seqlen]"]),
        (ids_of()[None], ["[1, 6, 12]", "[samples, seqlen]"]),
        (ids_of()[:0], ["[0, 12]"]),
        (ids_of()[:, :1], ["[6, 1]", "2 or more"]),
        (torch.full((2, 3), VOCABULARY), [f"token {VOCABULARY} ", f"vocabulary of {VOCABULARY}"]),
        (torch.full((2, 3), -1), ["token -1 "]),
        (np.full((2, 3), 2**64 - 1, dtype=np.uint64), ["token -1 "]),
        ([[1, 2], [3]], ["different lengths"]),
        ([[1.5, 2]], ["float64"]),
        (["some text"], ["integers"]),
        ([], ["integers"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(getattr(value, "shape", "")),
)
def test_ids_that_cannot_be_used(refused, dataset, words):
    refused(dataset, *words, error=InputError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seqlen": 1}, ["1 tokens", "2 or more"]),
        ({"num_samples": 0}, ["0", "1 or more"]),
        ({"seed": -1}, ["seed -1"]),
        ({"seed": 2**32}, ["seed"]),
        ({"dataset": 5}, ["int", "token ids"]),
        ({"dataset": "stdlib"}, ["stdlib-train"]),
    ],
)
def test_options_that_can_never_work(refused, options, words):
    refused(options.pop("dataset", "stdlib-train"), *words, error=UsageError, **options)


def damaged(path, kind: str):
    """A file of ids that is not what its name says."""
    if kind == "truncated.safetensors":
        save_file({"input_ids": ids_of()}, path)
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "names.safetensors":
        save_file({"a": ids_of(), "b": ids_of()}, path)
    elif kind == "float.safetensors":
        save_file({"input_ids": ids_of().float()}, path)
    elif kind == "objects.npy":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "float.npy":
        np.save(path, np.zeros((2, 3)))
    elif kind == "archive.npy":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros((2, 3), dtype=np.int64))
    elif kind in ("pickle.npy", "pickle.pt"):
        path.write_bytes(pickle.dumps([[1, 2]]))
    elif kind.startswith("empty"):
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing.npy", ["no such file"]),
        ("missing.safetensors", ["no such file"]),
        ("truncated.safetensors", ["truncated"]),
        ("empty.safetensors", ["whole safetensors"]),
        ("names.safetensors", ["2 tensors", "input_ids"]),
        ("float.safetensors", ["float32", "integers"]),
        ("objects.npy", ["array of token ids"]),
        ("pickle.npy", ["array of token ids"]),
        ("pickle.pt", [".safetensors or .npy"]),
        ("empty.npy", ["array of token ids"]),
        ("float.npy", ["float64", "integers"]),
        ("archive.npy", ["numpy.save"]),
    ],
)
def test_files_of_ids_that_cannot_be_used(refused, tmp_path, kind, words):
    refused(damaged(tmp_path / kind, kind), kind, *words, error=InputError)


# Text


def test_windows_are_the_joined_documents(samples_of, tokenizer, tmp_path):
    """Nothing is lost, padded or repeated: the stream is whole documents, each once, each ended by EOS."""
    texts = make_texts(60)
    samples = samples_of(write_texts(tmp_path / "rows.jsonl", texts), num_samples=40, seqlen=64)
    assert samples.input_ids.shape == (40, 64) and samples_of.said == []
    known = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    *whole, last = pieces(samples)
    numbers = [known.index(piece) for piece in whole]
    assert len(set(numbers)) == len(numbers) > 20
    assert numbers != sorted(numbers), "taken in their order"
    assert any(ids[: len(last)] == last for ids in known)


def test_documents_start_with_bos_where_the_tokenizer_adds_it(samples_of, tmp_path):
    folder = save_chat_model(tmp_path / "model", bos=True)
    samples = samples_of(write_texts(tmp_path / "rows.jsonl", make_texts(30)), folder, num_samples=9, seqlen=100)
    flat = samples.input_ids.flatten().tolist()
    assert flat[0] == BOS and flat.count(BOS) > 5
    assert all((first == EOS) == (second == BOS) for first, second in pairwise(flat))


def test_no_separator_without_an_eos_token(samples_of, tmp_path):
    folder = save_chat_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    samples = samples_of(write_texts(tmp_path / "rows.jsonl", make_texts(30)), folder, num_samples=9, seqlen=100)
    assert EOS not in samples.input_ids.flatten().tolist()


def test_one_long_document_does_not_take_everything(samples_of, tokenizer, tmp_path):
    long = make_texts(1, words=20_000)
    path = write_texts(tmp_path / "rows.jsonl", long + make_texts(200)[1:])
    for seed in range(20):  # in some of these orders the long one is among the first
        found = pieces(samples_of(path, num_samples=64, seqlen=64, seed=seed))
        assert max(map(len, found)) <= 64 * 64 // 16


def test_rests_of_long_documents_are_used_at_the_end(samples_of, tokenizer, tmp_path):
    texts = make_texts(3, words=900)
    path = write_texts(tmp_path / "rows.jsonl", texts)
    known = [tokenizer(text)["input_ids"] for text in texts]
    total = sum(map(len, known))
    samples = samples_of(path, num_samples=total // 64, seqlen=64)
    assert samples.input_ids.shape == (total // 64, 64) and samples_of.said == []
    found = sorted(token for piece in pieces(samples) for token in piece)
    assert len(found) > total * 0.9
    every = sorted(token for ids in known for token in ids)
    assert all(found.count(token) <= every.count(token) for token in set(found)), "a part came twice"


def test_same_seed_same_samples(samples_of, tmp_path):
    path = write_texts(tmp_path / "rows.jsonl", make_texts(100))
    state = torch.get_rng_state()
    digests = [samples_of(path, num_samples=8, seqlen=32, seed=seed).digest for seed in (0, 0, 1, 2**32 - 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_more_samples_begin_with_the_fewer(samples_of, tmp_path):
    path = write_texts(tmp_path / "rows.jsonl", make_texts(100))
    few, many = (samples_of(path, num_samples=count, seqlen=32).input_ids for count in (4, 16))
    assert torch.equal(few, many[:4])


@pytest.mark.slow
def test_samples_do_not_depend_on_hashes(samples_of, model_folder, tmp_path):
    path = write_texts(tmp_path / "rows.jsonl", make_texts(100))
    code = (
        "import sys, pathlib; from lowbit.text.samples import calibration_samples as f; "
        f"print(f(sys.argv[1], pathlib.Path(sys.argv[2]), num_samples=8, seqlen=32, vocabulary={VOCABULARY}, "
        "context=None).digest, hash('a'))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(path), str(model_folder)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=True)
    digest, its_hash = run.stdout.split()
    assert int(its_hash) != hash("a")
    assert digest == samples_of(path, num_samples=8, seqlen=32).digest


def test_samples_are_cut_to_the_context_aloud(samples_of, tmp_path):
    samples = samples_of(write_texts(tmp_path / "rows.jsonl", make_texts(60)), num_samples=4, seqlen=500, context=50)
    assert samples.input_ids.shape == (4, 50)
    assert len(samples_of.said) == 1 and "50" in samples_of.said[0] and "500" in samples_of.said[0]


def test_short_text_gives_fewer_samples_aloud(samples_of, tokenizer, tmp_path):
    texts = make_texts(5)
    samples = samples_of(write_texts(tmp_path / "rows.jsonl", texts), num_samples=100, seqlen=64)
    total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert samples.input_ids.shape == (total // 64, 64)
    assert len(samples_of.said) == 1 and f"{total // 64} samples of 64" in samples_of.said[0]
    assert "100" in samples_of.said[0]


def test_text_shorter_than_a_sample_is_one_sample_aloud(samples_of, tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text(make_texts(1)[0])
    samples = samples_of(tmp_path / "short.txt", seqlen=250)
    assert samples.input_ids.tolist() == [tokenizer(make_texts(1)[0])["input_ids"]]
    assert len(samples_of.said) == 1 and f"1 sample of {samples.tokens} tokens" in samples_of.said[0]


def test_short_samples_need_less_text(samples_of, tmp_path):
    (tmp_path / "short.txt").write_text("the quick brown fox")
    assert samples_of(tmp_path / "short.txt", seqlen=2).input_ids.shape[1] == 2


@pytest.mark.parametrize(
    ("words", "whole"), [(1500, True), (40_000, False)], ids=["all of it is tokenized", "too long for that"]
)
def test_windows_of_one_text_are_from_all_over_it(samples_of, tokenizer, tmp_path, words, whole):
    text = " ".join(f"{n}" for n in range(words))
    (tmp_path / "long.txt").write_text(text)
    count, seqlen = 8, 64
    assert (len(text) <= count * seqlen * 16) == whole
    samples = samples_of(tmp_path / "long.txt", num_samples=count, seqlen=seqlen)
    assert samples.input_ids.shape == (count, seqlen) and samples_of.said == []
    # the text counts: where a window is from can be read in it, and each is without a gap
    for part, row in enumerate(samples.input_ids):
        decoded = tokenizer.decode(row, clean_up_tokenization_spaces=False)
        place = text.find(decoded)
        assert part / count <= (place + len(decoded)) / len(text) and place / len(text) <= (part + 1) / count
    other = samples_of(tmp_path / "long.txt", num_samples=count, seqlen=seqlen, seed=1)
    assert other.digest != samples.digest
    assert samples_of(tmp_path / "long.txt", num_samples=count, seqlen=seqlen).digest == samples.digest


def test_text_that_just_suffices_is_used_in_full(samples_of, tokenizer, tmp_path):
    text = make_texts(1, words=600)[0]
    (tmp_path / "text.txt").write_text(text)
    ids = tokenizer(text)["input_ids"]
    samples = samples_of(tmp_path / "text.txt", num_samples=len(ids) // 64, seqlen=64)
    assert samples.input_ids.flatten().tolist() == ids[: len(ids) // 64 * 64]


def test_standard_library(samples_of):
    samples = samples_of("stdlib-train", num_samples=4, seqlen=200)
    assert samples.input_ids.shape == (4, 200) and samples.source == "stdlib-train"


# What is wrong with the model's side


def test_folder_without_a_tokenizer(refused, tmp_path):
    folder = save_chat_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    path = write_texts(tmp_path / "rows.jsonl", make_texts(3))
    refused(path, "tokenizer", ".safetensors", "'self'", error=InputError, folder=folder)


def test_tokenizer_of_another_model(refused, tmp_path):
    path = write_texts(tmp_path / "rows.jsonl", make_texts(30))
    refused(path, "vocabulary of 200", "rows.jsonl", error=InputError, vocabulary=200)
