"""The API of a server, through OpenAI's own client: answers are those of lowbit's own session."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from folders import save_tokenizer
from models import tiny_model
from served import LONG, NAME, Scripted, serving

from lowbit.options import BatchingOptions, LimitOptions

MESSAGES = [{"role": "user", "content": "the dog sleeps"}]


@pytest.fixture
def client(served):
    with served.client() as each:
        yield each


@pytest.fixture(scope="module")
def expected(session):
    """expected(prompt or messages, tokens) -> the greedy text and the tokens of the prompt."""

    def generate(prompt, tokens: int = 12, **options):
        ids = session.encode(prompt) if isinstance(prompt, str) else session.encode_chat(prompt)
        return session.generate(ids, max_new_tokens=tokens, **options).text, ids.shape[1]

    return generate


def counts(usage) -> tuple[int, int]:
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return usage.prompt_tokens, usage.completion_tokens


def test_the_one_model_is_listed(client):
    assert [each.id for each in client.models.list()] == [NAME]


def test_a_chat_is_answered_as_in_a_session(client, expected):
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=12)
    text, prompt_tokens = expected(MESSAGES)
    assert answer.choices[0].message.content == text and answer.model == NAME
    assert answer.choices[0].finish_reason == "length" and counts(answer.usage) == (prompt_tokens, 12)


def test_a_chat_streams_the_same_in_pieces(client, expected):
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    text, prompt_tokens = expected(MESSAGES)
    assert "".join(pieces) == text and len(pieces) > 1
    assert chunks[-1].choices[0].finish_reason == "length" and counts(chunks[-1].usage) == (prompt_tokens, 12)


def test_a_text_is_continued_at_once_and_in_pieces(client, expected):
    text, prompt_tokens = expected("the quick brown")
    how = {"model": NAME, "prompt": "the quick brown", "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**how)
    assert answer.choices[0].text == text and counts(answer.usage) == (prompt_tokens, 12)
    chunks = list(client.completions.create(**how, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert counts(chunks[-1].usage) == (prompt_tokens, 12)


def test_responses_are_answered_at_once_and_in_pieces(client, expected):
    text, prompt_tokens = expected(MESSAGES)
    answer = client.responses.create(model=NAME, input="the dog sleeps", max_output_tokens=12)
    assert answer.output_text == text
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (prompt_tokens, 12)
    events = list(client.responses.create(model=NAME, input=MESSAGES, max_output_tokens=12, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].type == "response.completed"


def test_an_answer_ends_before_a_stop_string(client, expected):
    whole, _ = expected(MESSAGES, 40)
    stop = whole[15:18]
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=40, stop=["never there", stop], stream=stream
        )
        last = list(answer) if stream else [answer]
        text = "".join(c.choices[0].delta.content or "" for c in last) if stream else last[0].choices[0].message.content
        assert text == whole[: whole.index(stop)]
        assert last[-1].choices[0].finish_reason == "stop" and 0 < last[-1].usage.completion_tokens < 40


def test_a_seed_makes_an_answer_repeatable(client, expected):
    def answer(**given) -> str:
        made = client.completions.create(model=NAME, prompt="the quick", max_tokens=16, temperature=1, **given)
        return made.choices[0].text

    assert answer(seed=3) == answer(seed=3) == expected("the quick", 16, temperature=1.0, seed=3)[0]
    assert len({answer(seed=seed) for seed in range(4)}) > 1


def test_options_of_the_loop_go_through(client, expected):
    """Which OpenAI's API lacks."""
    text, _ = expected("the quick", repetition_penalty=5.0)
    answer = client.completions.create(
        model=NAME, prompt="the quick", max_tokens=12, temperature=0, extra_body={"repetition_penalty": 5.0}
    )
    assert answer.choices[0].text == text != expected("the quick")[0]


def test_ten_clients_at_once_get_their_own_answers(served, expected):
    prompts = [f"the quick brown fox {number}" for number in range(10)]
    texts = [expected(prompt)[0] for prompt in prompts]
    assert len(set(texts)) > 5

    def ask(prompt: str) -> str:
        with served.client() as client:
            chunks = client.completions.create(model=NAME, prompt=prompt, max_tokens=12, stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(ask, prompts)) == texts


def test_many_at_once_are_as_each_alone(session, expected):
    """Of different lengths, sampled with seeds, while one goes on that takes minutes: more than there are slots."""
    limits = LimitOptions(max_tokens=LONG, context=LONG, max_requests=40)
    ways = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.5},
    ]

    def ask(number: int) -> tuple[str, int]:
        given = {"prompt": f"the quick brown fox {number} " * (1 + number % 4), "max_tokens": 3 + 5 * (number % 5)}
        with served.client() as client:
            made = client.completions.create(model=NAME, seed=number, **given, **ways[number % 4])
            return made.choices[0].text, made.usage.completion_tokens

    with serving(session, limits=limits, batching=BatchingOptions(slots=5)) as served, served.client() as client:
        endless = client.completions.create(model=NAME, prompt="the quick", max_tokens=LONG - 100, stream=True)
        next(iter(endless))
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(ask, range(20)))
        next(iter(endless))  # it has gone on
        endless.close()
    for number, (text, tokens) in enumerate(answers):
        prompt, new = f"the quick brown fox {number} " * (1 + number % 4), 3 + 5 * (number % 5)
        assert text == expected(prompt, new, seed=number, **ways[number % 4])[0] and tokens == new


@pytest.mark.parametrize("context", [LONG, None], ids=["in a slot", "alone"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_nobody_waits_for_ends(session, stream, context):
    """It would go on for minutes; one that has to be alone comes at once."""
    limits = LimitOptions(max_tokens=LONG, context=context)
    with serving(session, limits=limits, batching=BatchingOptions(slots=1)) as served, served.client() as client:
        how = {"model": NAME, "prompt": "the quick", "max_tokens": LONG - 100, "stream": stream}
        if stream:
            chunks = client.completions.create(**how)
            next(iter(chunks))
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=1.0).completions.create(**how)
        assert client.completions.create(model=NAME, prompt="the quick", max_tokens=2).usage.completion_tokens == 2
    assert session.decoder.stats.new_tokens == 2  # of the last, and all before have ended


def test_the_client_raises_what_the_server_refuses(client):
    with pytest.raises(openai.NotFoundError, match='no model "gpt-4" here'):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="n is 2"):
        client.chat.completions.create(model=NAME, messages=MESSAGES, n=2)
    with pytest.raises(openai.BadRequestError, match="exceed the context"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "dog " * LONG}])


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {
    "city": {"type": "string"}}}}}]  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Jena"}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def calling(session, tmp_path_factory):
    """A model of a kind whose answers transformers looks for calls in."""

    class Calling:
        model, context_length = tiny_model("qwen3", vocab_size=320), 4000
        tokenizer = save_tokenizer(tmp_path_factory.mktemp("qwen"), TEMPLATE)

    with serving(Scripted(Calling, f"Let me see. {CALL}")) as served, served.client() as client:
        yield client


def test_a_call_of_a_tool_is_found_in_an_answer(calling):
    answer = calling.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS).choices[0]
    call = answer.message.tool_calls[0].function
    assert (call.name, call.arguments) == ("weather", '{"city": "Jena"}') and answer.finish_reason == "tool_calls"
    assert answer.message.content.strip() == "Let me see."


def test_a_call_of_a_tool_is_found_in_a_stream(calling):
    chunks = list(calling.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS, stream=True))
    (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Jena"}')
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip() == "Let me see."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_a_tool_gave_goes_into_the_template(calling):
    function = {"name": "weather", "arguments": '{"city": "Jena"}'}
    called = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    turns = [*MESSAGES, called, {"role": "tool", "tool_call_id": "1", "content": "rain"}]
    short = calling.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS).usage.prompt_tokens
    assert calling.chat.completions.create(model=NAME, messages=turns, tools=TOOLS).usage.prompt_tokens > short
    fewer = calling.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS, tool_choice="none")
    assert fewer.usage.prompt_tokens < short


def test_a_template_that_shows_no_tools_takes_none(client):
    with pytest.raises(openai.BadRequestError, match="takes no tools"):
        client.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS)
