"""`minigpt serve`, asked as people's tools ask: with the `openai` client of PyPI, and with plain HTTP."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import ROOT, eventually
from serving import Serving

import minigpt
from minigpt.client.inprocess import Model

PROMPT = "The capital of France is"
OTHERS = ["The capital of Japan is", "Germany has a border with"]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with Serving("--log-format", "json") as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with server.openai() as made:
        yield made


@pytest.fixture(scope="module")
def model() -> Model:
    return minigpt.load("tiny")


def text_of(model: Model, prompt: Any, **options: Any) -> str:
    return "".join(token.text or "" for token in model.generate(prompt, **options))


def refused(call: Any, **fields: Any) -> openai.APIStatusError:
    """The error of a call that must be refused, with its parts as the client shows them."""
    with pytest.raises(openai.APIStatusError) as caught:
        call(**({"model": "tiny", "prompt": PROMPT} | fields))
    return caught.value


# Completions.


def test_the_models_list_has_all_that_a_client_reads(server: Serving, client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == ("tiny", "model", "minigpt")
    assert listed.created > 1_700_000_000
    assert listed.to_dict()["max_model_len"] == 512
    assert client.models.retrieve("tiny") == listed
    assert server.get("/v1/models").json()["object"] == "list"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_completion_is_the_text_of_the_model(client: openai.OpenAI, model: Model) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == text_of(model, PROMPT, max_tokens=20)
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", "tiny", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 20, 25)


def test_prompts_may_be_strings_or_ids_and_several(client: openai.OpenAI, model: Model) -> None:
    assert model.tokenizer is not None
    wanted = [text_of(model, prompt, max_tokens=8) for prompt in OTHERS]
    ids = [model.tokenizer.encode(prompt) for prompt in OTHERS]
    for prompt in (OTHERS, ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.text for choice in answer.choices] == wanted
        assert [choice.index for choice in answer.choices] == [0, 1]
    assert client.completions.create(model="tiny", prompt=ids[0], max_tokens=8, temperature=0).choices[0].text in wanted


def test_n_answers_are_drawn_with_seeds_that_follow_from_the_first(client: openai.OpenAI, model: Model) -> None:
    answer = client.completions.create(
        model="tiny", prompt=OTHERS, n=3, seed=7, max_tokens=12, extra_body={"minigpt": {}}
    )
    more = [hashlib.sha256((7).to_bytes(8, "big") + i.to_bytes(8, "big")).digest()[:8] for i in (1, 2)]
    seeds = [7, *(int.from_bytes(seed, "big") for seed in more)] * 2
    assert [choice.to_dict()["minigpt"]["seed"] for choice in answer.choices] == seeds
    for i, choice in enumerate(answer.choices):
        assert choice.index == i
        assert choice.text == text_of(model, OTHERS[i // 3], temperature=1.0, seed=seeds[i], max_tokens=12)


def test_sampling_options_are_those_of_generate(client: openai.OpenAI, model: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    answer = client.completions.create(model="tiny", prompt=PROMPT, extra_body={"top_k": 5}, **options)
    assert answer.choices[0].text == text_of(model, PROMPT, top_k=5, **options)
    answer = client.completions.create(model="tiny", prompt=PROMPT, **options | {"seed": -1})
    assert answer.choices[0].text == text_of(model, PROMPT, **options | {"seed": 2**64 - 1})


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.3}, {"presence_penalty": 1.5}, {"frequency_penalty": -0.7}, {"min_p": 0.2},
     {"logit_bias": {"1534": -100, "854": 3.5}},
     {"repetition_penalty": 0.9, "presence_penalty": -1, "frequency_penalty": 2, "min_p": 0.05,
      "logit_bias": {"13": -5}}],
    ids=str,
)  # fmt: skip
def test_penalties_bias_and_min_p_are_those_of_generate(
    server: Serving, client: openai.OpenAI, model: Model, options: dict[str, Any]
) -> None:
    named = {name: options[name] for name in options if name not in ("min_p", "repetition_penalty")}
    more = {name: options[name] for name in options if name not in named}
    own = options | ({"logit_bias": {int(token): bias for token, bias in options.get("logit_bias", {}).items()}})
    texts = set()
    for settings in ({"temperature": 0.0}, {"temperature": 2.0, "seed": 1}):
        shared: dict[str, Any] = {"max_tokens": 24, **settings}
        answer = client.completions.create(model="tiny", prompt=PROMPT, extra_body=more, **named, **shared)
        assert answer.choices[0].text == text_of(model, PROMPT, **own, **shared)
        texts |= {answer.choices[0].text, text_of(model, PROMPT, **shared)}
        events = events_of(server, **options, **shared)
        assert "".join(event["choices"][0]["text"] for event in events) == answer.choices[0].text
    assert len(texts) > 2


@pytest.mark.parametrize("stop", [".", ["Seine", "."], [" river S", "ABC"]])
def test_stop_strings_end_the_text(client: openai.OpenAI, model: Model, stop: str | list[str]) -> None:
    wanted = text_of(model, PROMPT, max_tokens=20, stop=[stop] if isinstance(stop, str) else stop)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stop=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (wanted, "stop")
    events = list(
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stop=stop, stream=True)
    )
    assert "".join(event.choices[0].text for event in events) == wanted
    assert events[-1].choices[0].finish_reason == "stop"


def test_null_means_the_default(server: Serving, model: Model) -> None:
    names = ("max_tokens", "n", "stop", "stream", "stream_options", "top_p", "logprobs", "user", "suffix", "best_of",
             "logit_bias", "presence_penalty", "echo", "seed")  # fmt: skip
    answer = server.post("/v1/completions", {"prompt": PROMPT, "temperature": 0, **dict.fromkeys(names)}).json()
    assert answer["choices"][0]["text"] == text_of(model, PROMPT, max_tokens=16)
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_context_ends_a_text(client: openai.OpenAI) -> None:
    ids = [5] * 510
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=100, temperature=0)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


# Streams.


def events_of(server: Serving, path: str = "/v1/completions", **fields: Any) -> list[Any]:
    """Every event of a stream, as it lies on the line."""
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True} | fields
    with httpx.stream("POST", server.address + path, json=body, timeout=60, trust_env=False) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(response.iter_text()).split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith("data: ") for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_stream_is_the_text_and_its_last_event_alone_says_why_it_ended(
    server: Serving, model: Model, logprobs: int | None
) -> None:
    events = events_of(server, logprobs=logprobs, n=2)
    for index in range(2):
        choices = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in choices) == text_of(model, PROMPT, max_tokens=12)
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert all("usage" not in event for event in events)


def test_usage_comes_in_an_event_of_its_own_if_asked_for(client: openai.OpenAI) -> None:
    events = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [event.usage is None for event in events] == [True] * (len(events) - 1) + [False]
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == 5  # type: ignore[union-attr]


def test_spans_come_only_if_asked_for(server: Serving) -> None:
    assert all("minigpt" not in event for event in events_of(server))
    events = events_of(server, minigpt={"spans": True})
    for event in events[:-1]:
        ((own, *stages),) = event["minigpt"]["spans"]
        assert len(stages) == 2
        assert own.keys() == {"compute", "seal", "open", "wait", "bytes"}
        assert stages[0]["compute"] > 0
    assert sum(event["minigpt"]["spans"][0][0]["bytes"] for event in events[:-1]) > 500
    assert "seed" in events[-1]["minigpt"]


def test_a_stream_never_splits_a_character(server: Serving, model: Model) -> None:
    """Drawn hot, tokens are bytes that are no text: what is sent is the decoder's text all the same."""
    assert model.tokenizer is not None
    options: dict[str, Any] = {"temperature": 2.0, "max_tokens": 100}
    for seed in range(100):  # one with characters of several tokens, and with some that are never whole
        options["seed"] = seed
        drawn = [model.tokenizer.name(token.id) for token in model.generate(PROMPT, **options)]
        if sum(name.startswith("bytes:") for name in drawn) > 2:
            break
    events = events_of(server, logprobs=0, **options)
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == text_of(model, PROMPT, **options)
    logprobs = [event["choices"][0]["logprobs"] for event in events]
    names = [name for each in logprobs for name in each["tokens"]]
    offsets = [offset for each in logprobs for offset in each["text_offset"]]
    assert names == drawn
    assert len(offsets) == len(names)
    assert any(name.startswith("bytes:") for name in names)
    for name, offset in zip(names, offsets, strict=True):
        if not name.startswith("bytes:") and name != "<|endoftext|>":
            # A broken character before it is seen to be one only here, and takes the first place.
            assert text[offset:].lstrip("\ufffd").startswith(name)


# What small servers get wrong, as far as it is not above.


def scores_of(model: Model, prompt: Any, top: int = 0) -> Any:
    """What OpenAI's logprobs object says of a prompt."""
    assert model.tokenizer is not None
    name = model.tokenizer.name
    tokens = model.score(prompt, top)
    likely: list[Any] = [
        {name(each.id): each.logprob for each in token.top} | {name(token.id): token.logprob or 0.0} for token in tokens
    ]
    return [name(token.id) for token in tokens], [token.logprob for token in tokens], [None, *likely[1:]]


def same(one: Any, other: Any) -> bool:
    """Whether two `top_logprobs` say the same, but for last bits: rows that differ in number differ in these."""
    return len(one) == len(other) and all(
        (mine is None and yours is None) or mine == pytest.approx(yours, abs=1e-4)
        for mine, yours in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("top", [0, 1, 5])
@pytest.mark.parametrize("length", [0, 4])
def test_echo_has_the_prompts_log_probabilities(client: openai.OpenAI, model: Model, top: int, length: int) -> None:
    prompts = [PROMPT, "Zürich liegt 東京 a"]
    answer = client.completions.create(
        model="tiny", prompt=prompts, echo=True, logprobs=top, max_tokens=length, temperature=0
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        names, logprobs, likely = scores_of(model, prompt, top)
        told = choice.logprobs
        assert told is not None
        assert told.tokens is not None
        assert told.token_logprobs is not None
        count = len(names)
        text = prompt + (text_of(model, prompt, max_tokens=length) if length else "")
        assert (choice.text, choice.finish_reason) == (text, "length")
        assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset or []) == count + length
        assert told.tokens[:count] == names
        assert told.token_logprobs[0] is None
        assert told.token_logprobs[1:count] == pytest.approx(logprobs[1:], abs=1e-4)
        for name, offset in zip(told.tokens, told.text_offset or [], strict=True):
            assert name.startswith("bytes:") or text[offset:].startswith(name)
        if not top:
            assert told.top_logprobs is None
            continue
        assert told.top_logprobs is not None
        assert told.top_logprobs[0] is None
        assert same(told.top_logprobs[:count], likely)
        for name, logprob, each in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
            assert each is None or each[name] == logprob  # to the bit: lm-eval compares them with !=
        for name, each in zip(told.tokens[count:], told.top_logprobs[count:], strict=True):
            assert max(each.values()) == each[name]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * length


def test_an_echo_without_log_probabilities_is_the_prompt_before_its_answer(server: Serving, model: Model) -> None:
    assert model.tokenizer is not None
    for prompt in (PROMPT, model.tokenizer.encode(PROMPT)):
        events = events_of(server, prompt=prompt, echo=True, n=2)
        for index in range(2):
            texts = [event["choices"][0]["text"] for event in events if event["choices"][0]["index"] == index]
            assert texts[0] == PROMPT
            assert "".join(texts) == PROMPT + text_of(model, PROMPT, max_tokens=12)
        assert all(event["choices"][0]["logprobs"] is None for event in events)


def test_a_streamed_echo_says_what_a_whole_one_does(server: Serving) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 2, "n": 2, "temperature": 1, "seed": 4}
    events = events_of(server, **fields)
    body = {"prompt": PROMPT, "max_tokens": 12, **fields}
    for choice in server.post("/v1/completions", body).json()["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        for name in ("tokens", "text_offset"):
            assert [value for each in own for value in each["logprobs"][name]] == choice["logprobs"][name]
        likely = [value for each in own for value in each["logprobs"]["top_logprobs"]]
        assert same(likely, choice["logprobs"]["top_logprobs"])


def test_an_echo_of_ids_that_end_within_a_character_places_what_follows(server: Serving, model: Model) -> None:
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("a 東")[:-1]
    body = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 3, "logit_bias": {"1534": 100}}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    first = choice["logprobs"]["text_offset"][len(ids)]
    assert choice["text"][first:] == " Paris" * 3
    assert choice["text"][:first].startswith("a ")


def test_a_prompt_as_long_as_the_context_is_scored(client: openai.OpenAI, model: Model) -> None:
    ids = [(7 * place) % 2000 for place in range(512)]
    answer = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert len(told.token_logprobs) == 513
    assert told.token_logprobs[1:512] == pytest.approx([token.logprob for token in model.score(ids)][1:], abs=1e-4)


def test_no_tokens_without_echo_are_refused(client: openai.OpenAI) -> None:
    error = refused(client.completions.create, max_tokens=0)
    assert (error.status_code, error.param) == (400, "max_tokens")
    assert "with echo" in error.message


def test_an_answer_that_would_tell_too_many_numbers_is_refused(client: openai.OpenAI) -> None:
    error = refused(client.completions.create, logprobs=20, n=128, max_tokens=512)
    assert (error.status_code, error.param) == (400, "logprobs")
    assert "wanted at most 524288" in error.message


def test_finish_reason_is_null_until_the_end(server: Serving) -> None:
    reasons = [event["choices"][0]["finish_reason"] for event in events_of(server, logprobs=0)]
    assert "" not in reasons
    assert reasons[-1] == "length"


def test_logprobs_are_those_of_the_model_and_never_a_list_with_holes(client: openai.OpenAI, model: Model) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=0)
    told = answer.choices[0].logprobs
    assert told is not None
    tokens = list(model.generate(PROMPT, max_tokens=12, logprobs=True))
    assert told.token_logprobs == pytest.approx([token.logprob for token in tokens], abs=1e-4)
    assert told.tokens == [token.text for token in tokens]
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(12)]
    assert told.top_logprobs is None
    assert client.completions.create(model="tiny", prompt=PROMPT).choices[0].logprobs is None


def test_alternatives_are_those_of_the_model_and_their_floats_those_of_the_tokens(
    client: openai.OpenAI, model: Model
) -> None:
    assert model.tokenizer is not None
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": 2}
    for top in (1, 5, 20):
        told = client.completions.create(model="tiny", prompt=PROMPT, logprobs=top, **options).choices[0].logprobs
        assert told is not None
        assert told.tokens is not None
        tokens = list(model.generate(PROMPT, logprobs=True, top_logprobs=top, **options))
        wanted = [{model.tokenizer.name(each.id): each.logprob for each in token.top} for token in tokens]
        assert told.top_logprobs is not None
        drawn = [{told.tokens[i]: tokens[i].logprob} for i in range(12)]
        assert same(told.top_logprobs, [likely | own for likely, own in zip(wanted, drawn, strict=True)])
        for name, logprob, each in zip(told.tokens, told.token_logprobs or [], told.top_logprobs, strict=True):
            assert each[name] == logprob


def test_a_prompt_that_is_too_long_is_told_the_limit(client: openai.OpenAI) -> None:
    error = refused(client.completions.create, prompt=[5] * 513)
    assert (error.status_code, error.code, error.param) == (400, "context_length_exceeded", "prompt")
    assert "513 tokens" in error.message
    assert "512 positions" in error.message


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings", "/nothing", "/page/..%2fapp.py", "/page/app.py"])
def test_an_unknown_path_is_told_where_text_is(server: Serving, path: str) -> None:
    for answer in (server.get(path), server.post(path, {})):
        assert answer.status_code == (405 if path == "/page/app.py" and answer.request.method == "POST" else 404)
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert "/v1/completions" in answer.json()["error"]["message"]


# Refusals.


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "x"), ("best_of", 2), ("response_format", {"type": "json_object"}), ("tools", [{}]),
     ("ignore_eos", True), ("stop_token_ids", [3]), ("guided_json", {}), ("echo", "yes")],
)  # fmt: skip
def test_what_would_change_the_text_is_refused_by_name(server: Serving, field: str, value: Any) -> None:
    answer = server.post("/v1/completions", {"prompt": PROMPT, field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert field in error["message"]


def test_what_changes_nothing_is_ignored(server: Serving) -> None:
    fields = {"user": "me", "metadata": {"a": 1}, "store": False, "presence_penalty": 0, "logit_bias": {}, "best_of": 1,
              "response_format": {"type": "text"}, "parallel_tool_calls": True, "service_tier": "auto"}  # fmt: skip
    assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1, **fields}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("temperature", 3, "got 3, wanted less than or equal to 2"), ("temperature", "1", "got str, wanted"),
     ("temperature", True, "got True, wanted"), ("top_p", 0, "greater than 0"), ("n", 0, "got 0"),
     ("n", 129, "got 129"),
     ("max_tokens", 1.5, "got 1.5"), ("max_tokens", -1, "got -1"), ("stop", [""], "stop"), ("stop", ["a"] * 5, "stop"),
     ("seed", 2**70, "seed"), ("stream", "yes", "stream"), ("prompt", "", "none empty"), ("prompt", [], "none empty"),
     ("prompt", ["a", 1], "a list of strings"), ("prompt", [1, True], "token ids"), ("prompt", {"a": 1}, "a string"),
     ("prompt", [[]], "none empty"), ("prompt", [99999], "outside the vocabulary"), ("top_k", -2, "got -2"),
     ("min_p", 1.1, "got 1.1, wanted 0 (all) to 1; 0.02 to 0.1 is usual"), ("min_p", -0.1, "usual"),
     ("repetition_penalty", 0, "got 0, wanted any finite number above 0; 1 is none, 1.1 to 1.3 usual"),
     ("repetition_penalty", "1.2", "got str, wanted any finite number above 0"), ("repetition_penalty", -1, "usual"),
     ("presence_penalty", float("nan"), "wanted any finite number; 0 is none, -2 to 2 usual"),
     ("frequency_penalty", float("inf"), "wanted any finite number; 0 is none, -2 to 2 usual"),
     ("presence_penalty", True, "got True, wanted any finite number"),
     ("logit_bias", [5], "at most 1024 ids"), ("logit_bias", {"a": 1}, "at most 1024 ids"),
     ("logit_bias", {"5": "1"}, "-100 (never) to 100 (always) is usual"), ("logit_bias", {"5": True}, "usual"),
     ("logit_bias", {"5": 1, "05": 2}, "each once"), ("logit_bias", {"-1": 1}, "usual"),
     ("logit_bias", {"5": float("nan")}, "any finite number"), ("logit_bias", {"5": 10**400}, "any finite number"),
     ("logit_bias", dict.fromkeys(map(str, range(1025)), 1), "at most 1024 ids"),
     ("logit_bias", {"2048": 1}, "has the id 2048, wanted one of the model's, 0 to 2047"),
     ("logprobs", 21, "got 21, wanted 0 (each token's own) to 20; 5 is usual"), ("logprobs", -1, "5 is usual"),
     ("prompt", "\ud800", "UTF-8"), ("minigpt", {"spans": True}, "needs stream"), ("logprobs", True, "logprobs")],
)  # fmt: skip
def test_a_wrong_value_is_told_what_was_got_and_wanted(server: Serving, field: str, value: Any, says: str) -> None:
    body = json.dumps({"prompt": PROMPT} | {field: value})
    answer = httpx.post(
        f"{server.address}/v1/completions", content=body, headers={"Content-Type": "application/json"}, trust_env=False
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == field
    assert says in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[1]", b"\xff", b"[" * 100_000, b'{"prompt": "a", "temperature": NaN}', b'{"a": 1}']
)
def test_a_body_that_is_no_request_is_refused(server: Serving, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.address}/v1/completions", content=body, headers=headers, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "\ud800"}), ("/detokenize", {"tokens": [], "model": "\ud800"}),
     ("/v1/completions", {"prompt": ["\ud800"]}), ("/v1/completions", {"prompt": "a", "stop": "\ud800"}),
     ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}),
     ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]})],
)  # fmt: skip
def test_text_that_is_not_utf_8_is_refused_everywhere(server: Serving, path: str, body: Any) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.address + path, content=json.dumps(body), headers=headers, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, None)


def raw(server: Serving, data: bytes) -> bytes:
    """What comes for these bytes, until the server ends the connection or says nothing for a second."""
    said = b""
    with socket.create_connection(("127.0.0.1", server.port), 60) as sock:
        sock.sendall(data)
        with contextlib.suppress(OSError):
            while part := sock.recv(2**16):
                said += part
                sock.settimeout(1)
    return said


def test_a_request_with_two_lengths_is_refused_and_nothing_after_it_answered(server: Serving) -> None:
    """A proxy that goes by the other length would take the second request for a part of the first."""
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    both = head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(server, both)
    assert b" 400 " in answer.splitlines()[0]
    assert b"connection: close" in answer.lower()
    assert raw(server, both + b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").count(b"HTTP/1.1") < 2


def test_a_head_has_16_kib_however_it_comes(server: Serving) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: "
    assert b" 200 " in raw(server, head + b"a" * 15_000 + b"\r\n\r\n")
    for size in (16_400, 65_000, 200_000):
        assert raw(server, head + b"a" * size + b"\r\n\r\n") == b""


def test_a_foreign_page_is_refused(server: Serving) -> None:
    own = server.address.removeprefix("http://")
    body = {"prompt": PROMPT, "max_tokens": 1}
    assert server.post("/v1/completions", body, Origin=f"http://{own}").status_code == 200
    for origin in (
        "http://evil.example",
        "null",
        f"http://{own}1",
        "https://127.0.0.1",
        f"http://evil@{own}",
        "http://[",
        "",
    ):
        answer = server.post("/v1/completions", body, Origin=origin)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "[",
        "a@b",
        "evil@127.0.0.1",
        "127.0.0.1#x",
        "127.0.0.1/x",
        "127.0.0.1:99999999",
        "127.0.0.1:x",
        "::1",
    ):
        answer = server.get("/v1/models", Host=host)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "unknown_host")
    for host in (f"LOCALHOST:{server.port}", "[::1]", f"[::1]:{server.port}"):
        assert server.get("/v1/models", Host=host).status_code == 200
    two = f"Origin: http://{own}\r\n" + "Origin: http://evil.example\r\n"
    assert b" 403 " in raw(server, f"GET /health HTTP/1.1\r\nHost: {own}\r\n{two}\r\n".encode())
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
        answer = httpx.post(
            f"{server.address}/v1/completions",
            content=json.dumps(body),
            headers={"Content-Type": kind},
            trust_env=False,
        )
        assert answer.status_code == 415
    assert eventually(lambda: '"path": "/v1/completions", "status": 415' in server.log)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [("completions", {"prompt": "\ud800"}, "prompt: not UTF-8 text"),
     ("completions", [1], "the body: got list, wanted a JSON object"),
     ("chat/completions", {"messages": [1]}, "messages.0: got 1, wanted a JSON object"),
     ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content: not UTF-8 text")],
)  # fmt: skip
def test_a_body_is_refused_in_words_of_json_and_none_of_python(
    server: Serving, path: str, body: Any, says: str
) -> None:
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.address}/v1/{path}", content=data, headers=kind, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, says)


def test_another_model_is_never_loaded(client: openai.OpenAI) -> None:
    for name in ("gpt2", "/etc", "openai-community/gpt2"):
        error = refused(client.completions.create, model=name)
        assert (error.status_code, error.code) == (404, "model_not_found")


def test_a_body_that_is_too_long_is_refused(server: Serving) -> None:
    assert server.post("/v1/completions", {"prompt": "a" * 2**20}).status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 2**14

    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.address}/v1/completions", content=chunks(), headers=headers, trust_env=False)
    assert answer.status_code == 413


# Chats and tokens.


def test_a_model_without_a_template_has_no_chats(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
    assert caught.value.code == "no_chat_template"
    assert "/v1/completions" in caught.value.message


def test_a_plain_template_is_there_if_asked_for(model: Model) -> None:
    with Serving("--chat-template", "plain") as server, server.openai() as client:
        assert client.models.list().data[0].to_dict()["chat_template"] == "plain"
        assert "role: text" in server.log
        messages: Any = [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "The capital of"}, {"type": "text", "text": " Spain?"}],
            },
        ]
        prompt = "system: Be brief.\nuser: The capital of Spain?\nassistant:"
        wanted = text_of(model, prompt, max_tokens=10, stop=["\nuser:"])
        options: Any = {"model": "tiny", "messages": messages, "max_tokens": 10, "temperature": 0}
        answer = client.chat.completions.create(**options, logprobs=True)
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content == wanted
        assert answer.object == "chat.completion"
        assert answer.choices[0].logprobs is not None
        assert "".join(each.token for each in answer.choices[0].logprobs.content or []).startswith(wanted)
        events = list(client.chat.completions.create(**options, stream=True))
        assert events[0].choices[0].delta.role == "assistant"
        assert "".join(event.choices[0].delta.content or "" for event in events) == wanted
        assert {event.object for event in events} == {"chat.completion.chunk"}
        assert events[-1].choices[0].finish_reason in ("length", "stop")
        likely = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0].logprobs
        for each in (likely and likely.content) or []:
            assert len(each.top_logprobs) == 3
            assert each.logprob == each.top_logprobs[0].logprob  # greedy: to the bit
            assert (each.token, each.bytes) == (each.top_logprobs[0].token, each.top_logprobs[0].bytes)
        assert likely
        assert client.chat.completions.create(**options, n=2, presence_penalty=1, logit_bias={"5": 1}).choices[1]
        bad: list[dict[str, Any]] = [{"logprobs": False, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}]
        for fields in bad:
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**options, **fields)
            assert caught.value.param == "top_logprobs"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**options, tools=[{"type": "function", "function": {"name": "f"}}])
        assert caught.value.param == "tools"


TEMPLATES = {
    "ends": "{% for m in messages %}{{ m.role }}|{{ m.content }}{{ eos_token }}{% endfor %}",
    "raises": "{{ raise_exception('only one message') }}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "takes for ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "takes all memory": "{{ 'a' * 9999999999 }}",
}


def chatty(path: Path, template: str) -> Path:
    """The embedded checkpoint, with a chat template."""
    folder = path / "chatty"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes((ROOT / "minigpt" / "data" / name).read_bytes())
    settings = {"chat_template": template, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_checkpoints_template_is_used_within_bounds(tmp_path: Path, kind: str) -> None:
    folder = chatty(tmp_path, TEMPLATES[kind])
    model = minigpt.load(folder)
    with Serving("--model", str(folder)) as server, server.openai() as client:
        options: Any = {"model": "chatty", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        if kind == "ends":
            answer = client.chat.completions.create(**options, max_tokens=8)
            assert answer.choices[0].message.content == text_of(model, "user|Hello<|endoftext|>", max_tokens=8)
            assert client.models.list().data[0].to_dict()["chat_template"] == "checkpoint"
            return
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**options)
        assert caught.value.code == "chat_template_failed"
        assert server.get("/health").status_code == 200


def renderers(server: Serving) -> int:
    """The processes in which templates are rendered now."""
    count = 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            count += parent == server.process.pid and b"template.py" in (place / "cmdline").read_bytes()
    return count


def test_templates_are_rendered_by_few_processes_and_for_as_many_as_may_wait(tmp_path: Path) -> None:
    folder = chatty(tmp_path, TEMPLATES["takes for ever"])
    chat = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = head + f"Content-Length: {len(chat)}\r\n\r\n".encode() + chat
    flags = ("--model", str(folder), "--connections", "2", "--queue", "8")
    with Serving(*flags) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 60)) for _ in range(30)]
        for sock in socks:
            sock.sendall(whole)
        most = 0
        until = time.monotonic() + 120
        while server.log.count(" 400 ") < 4:
            assert time.monotonic() < until
            most = max(most, renderers(server))
            assert server.get("/health").status_code == 200
        assert 0 < most <= 4
        assert eventually(lambda: server.log.count(" 429 ") == 20)
        stack.close()  # for those who leave nothing is rendered
        assert eventually(lambda: renderers(server) == 0)
        assert eventually(lambda: server.log.count(" 499 ") > 0)


def test_tokens_come_as_from_vllm(server: Serving, model: Model) -> None:
    assert model.tokenizer is not None
    text = "Zürich 東京"
    answer = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == model.tokenizer.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    assert len(answer["token_strs"]) == answer["count"]
    assert server.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert server.post("/detokenize", {"tokens": [99999]}).status_code == 400
    assert server.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"


# State.


def test_health_readiness_and_evidence(server: Serving, tmp_path: Path) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"ready": True}
    told = server.get("/v1/attestation").json()
    assert re.fullmatch("[0-9a-f]{64}", told["manifest_sha256"])
    assert told["simulated"] is True
    assert [(stage["index"], stage["layers"]) for stage in told["stages"]] == [(0, [0, 6]), (1, [6, 12])]
    for stage in told["stages"]:
        assert (stage["verdict"], stage["provider"]) == ("PASS", "mock")
        assert len(stage["checks"]) > 2
        file = tmp_path / "evidence.json"
        file.write_text(json.dumps(stage["evidence"]))
        shown = subprocess.run(
            ["python", "-m", "attest", "show", str(file)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "mock (1)" in shown.stdout


def test_metrics_count_and_name_nobody(server: Serving, client: openai.OpenAI) -> None:
    names = ("minigpt_generated_tokens_total", "minigpt_prompt_tokens_total", "minigpt_link_bytes_total",
             "minigpt_time_to_first_token_seconds_count", "minigpt_inter_token_seconds_count")  # fmt: skip
    before = [server.metric(name) for name in names]
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9, user="somebody", temperature=0)
    grown = [server.metric(name) - value for name, value in zip(names, before, strict=True)]
    assert grown[:2] == [9, 5]
    assert grown[2] > 9 * 500
    assert grown[3:] == [1, 8]
    assert server.metric("minigpt_stage_up") == 2
    assert server.metric("minigpt_answers_running") == 0
    text = server.get("/metrics").text
    assert "somebody" not in text
    assert "France" not in text


def test_metrics_have_each_stages_own_figures(server: Serving, client: openai.OpenAI) -> None:
    names = ("minigpt_stage_tokens_total", "minigpt_stage_steps_total")
    time.sleep(1.1)  # for which a report is fresh
    before = [server.metric(name) for name in names]
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9, temperature=1, seed=1)
    # Each of two stages counts nine.
    assert eventually(lambda: [server.metric(name) - was for name, was in zip(names, before, strict=True)] == [18, 18])
    assert server.metric("minigpt_stage_tokens_per_second") > 0
    assert server.metric("minigpt_stage_batch") == 2
    assert server.metric("minigpt_stage_cache_bytes") > 0
    text = server.get("/metrics").text
    for name in ("up", "uptime", "weights_bytes", "channels", "sequences", "queue", "tokens_per_second", "batch",
                 "cache_bytes", "cache_limit_bytes", "steps_total", "tokens_total", "resumed_total"):  # fmt: skip
        assert f"# HELP minigpt_stage_{name} " in text
        assert f"# TYPE minigpt_stage_{name} {'counter' if name.endswith('_total') else 'gauge'}\n" in text
        assert f'\nminigpt_stage_{name}{{stage="1"}} ' in text


def test_the_page_and_every_answer_have_a_strict_policy(server: Serving) -> None:
    for path in ("/", "/page/page.js", "/page/page.css", "/v1/models", "/nothing"):
        answer = server.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert server.get("/").headers["content-type"].startswith("text/html")
    assert server.get("/openapi.json").json()["paths"].keys() >= {"/v1/completions", "/v1/attestation", "/ready"}


def test_the_log_has_a_line_for_each_request_and_nothing_of_its_content() -> None:
    secret = "Kopenhagen liegt am Meer"
    with Serving("--log-format", "json") as server:

        def lines() -> list[Any]:
            return [json.loads(line) for line in server.log.split("\n")[:-1] if line.startswith("{")]

        asked: list[tuple[str, Any]] = [
            ("/v1/completions", {"prompt": secret, "max_tokens": 3, "user": "xyzzy"}),
            ("/v1/completions", {"prompt": secret, "stop": secret, "n": secret}),
            (f"/{secret}?{secret}", {}),
        ]
        for number, (path, body) in enumerate(asked, 1):
            server.post(path, body)
            assert eventually(lambda number=number: len(lines()) == number)  # it is written after the answer
        first, *_ = found = lines()
        assert {"method", "path", "status", "ms", "prompt_tokens", "completion_tokens", "time"} == first.keys()
        assert first["completion_tokens"] == 3
        assert [line["status"] for line in found] == [200, 400, 404]
        for word in ("Kopenhagen", "xyzzy"):
            assert word not in server.log


BUGS = """
import sys
from minigpt.__main__ import main
from minigpt.serve.service import Service
async def fail(self, *_, **__):
    raise RuntimeError("a secret")
    yield
Service.attestation, Service.generate = fail, fail
sys.exit(main(sys.argv[1:]))
"""


def test_a_bug_is_an_error_in_the_same_form_and_its_place_is_logged(tmp_path: Path) -> None:
    with Serving(python=("-c", BUGS)) as server:
        for answer in (server.get("/v1/attestation"), server.post("/v1/completions", {"prompt": PROMPT})):
            assert answer.status_code == 500
            assert answer.json()["error"]["type"] == "server_error"
        assert eventually(lambda: server.log.count("failed: ") == 2)
        assert "secret" not in server.log
        assert "Traceback" not in server.log
        assert server.get("/health").status_code == 200


# Keys, hosts, the command.


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef-secret\n")
    path.chmod(0o600)
    return path


def test_a_key_protects_all_but_health(key: Path) -> None:
    with Serving("--api-key-file", str(key)) as server:
        assert server.get("/health").status_code == 200
        for path in (
            "/",
            "/v1/models",
            "/metrics",
            "/ready",
            "/v1/attestation",
            "/openapi.json",
            "/page/page.js",
            "/x",
        ):
            assert server.get(path).status_code == 401
        with server.openai("wrong") as client:
            error = refused(client.completions.create)
            assert (error.status_code, error.code) == (401, "invalid_api_key")
        secret = key.read_text().strip()
        with server.openai(secret) as client:
            assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).choices
        page = httpx.get(server.address, auth=("me", secret), trust_env=False)  # as a browser asks for it
        assert page.status_code == 200
        assert httpx.get(server.address, auth=("me", "wrong"), trust_env=False).status_code == 401
        assert secret not in server.log


@pytest.mark.parametrize(
    ("flags", "says"),
    [(["--host", "0.0.0.0"], "give --api-key-file"), (["--api-key-file", "OPEN"], "0600"),
     (["--host", "192.0.2.1", "--api-key-file", "KEY"], "cannot listen"),
     (["--api-key-file", "SHORT"], "16 to"), (["--manifest-sha256", "a"], "--manifest"),
     (["--api-key-file", "/nonexistent"], "/nonexistent: No such file"), (["--chat-template", "x"], "plain")],
)  # fmt: skip
def test_a_server_that_would_not_be_safe_does_not_start(key: Path, flags: list[str], says: str) -> None:
    (key.parent / "open").write_text(key.read_text())
    (key.parent / "short").write_text("abc")
    (key.parent / "short").chmod(0o600)
    names = {"KEY": str(key), "OPEN": str(key.parent / "open"), "SHORT": str(key.parent / "short")}
    command = ["python", "-m", "minigpt", "serve", "--port", "0", *(names.get(flag, flag) for flag in flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_all_hosts_are_served_with_a_key(key: Path) -> None:
    with Serving("--host", "0.0.0.0", "--api-key-file", str(key), "--hostname", "gpt.example") as server:
        assert "TLS" in server.log
        authorization = f"Bearer {key.read_text().strip()}"
        for host, status in (("gpt.example", 200), ("10.1.2.3:8000", 200), ("evil.example", 403)):
            address = f"http://127.0.0.1:{server.port}/v1/models"
            headers = {"Host": host, "Authorization": authorization}
            assert httpx.get(address, headers=headers, trust_env=False).status_code == status


def test_the_curl_line_works_as_it_stands(server: Serving) -> None:
    (line,) = [line for line in server.log.splitlines() if line.startswith("curl ")]
    environment = os.environ | {"NO_PROXY": "*"}
    said = subprocess.run(["bash", "-c", f"{line} -sSN"], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(said.stdout)["choices"][0]["text"].startswith(" Paris")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish(model: Model, how: signal.Signals) -> None:
    with Serving() as server:
        link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": True}
        link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = link.getresponse()
        first = answer.readline()
        server.process.send_signal(how)
        rest = (first + answer.read()).decode()
        answer.close()
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in rest.splitlines() if line.startswith("data: {")]
        assert "".join(texts) == text_of(model, PROMPT, max_tokens=200)
        link.close()
        assert server.process.wait(60) == (0 if how is signal.SIGTERM else 130)
        assert "Traceback" not in server.log
