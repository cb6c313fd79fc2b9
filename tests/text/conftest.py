"""A tiny model with a tokenizer, and calibration_samples with what it announced."""

import pytest
from folders import VOCABULARY, save_chat_model
from transformers import AutoTokenizer

from lowbit.text.samples import calibration_samples


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def samples_of(model_folder):
    """samples_of(dataset, **options) -> Samples; samples_of.said is what was announced."""

    def run(dataset, folder=model_folder, vocabulary=VOCABULARY, context=256, **options):
        run.said = []
        options |= {"vocabulary": vocabulary, "context": context, "announce": run.said.append}
        return calibration_samples(dataset, folder, **options)

    return run


@pytest.fixture
def refused(samples_of):
    """refused(dataset, *words, **options): an error in one line, with the words in it."""

    def check(dataset, *words, error, **options):
        with pytest.raises(error) as caught:
            samples_of(dataset, **options)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 600, message
        for word in words:
            assert str(word) in message, message

    return check
