"""generate(): every way of decoding equals the same without a cache."""

import copy
import logging
import warnings
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from bmojo.cache_bmojo import BMojoCache
from bmojo.configuration_bmojo import BMojoConfig
from bmojo.modeling_bmojo import CACHE_NAME, BMojoForCausalLM


ROOT = Path(__file__).resolve().parent.parent
MIXED = {
    "layers_block_type": ["mamba2", "full_attention", "sliding_attention", "mamba", "bmojo"],
    "num_hidden_layers": 5,
}
DELTAS = {
    "layers_block_type": ["gated_deltanet", "bmojo"],
    "ssm_type": "gated_kalmanet",
    "num_iter": 3,  # as many graph nodes as need be
    "tie_attn_weights": False,
    "fading_query": True,
}
VARIANTS = {
    "bmojo": {},
    "bmojo-mamba": {"ssm_type": "mamba", "eidetic_position": "rank", "eidetic_chunk_size": 7},
    "mixed": MIXED,
}
EXACT = {"dtype": torch.float64, "eos_token_id": None}  # the tiny models would now and then end by themselves
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
cache_of = attrgetter(CACHE_NAME)  # generate() returns transformers' own outputs


def random_ids(batch: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, steps: int) -> torch.Tensor:
    """The ids and `steps` more, the whole text read again for each."""
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def assert_greedy(model, prompt, text, steps: int):
    """The text is the prompt and `steps` tokens, each the likeliest one after those before it: one forward, no cache."""
    assert text.shape == (prompt.shape[0], prompt.shape[1] + steps)
    assert torch.equal(text[:, : prompt.shape[1]], prompt)
    with torch.no_grad():
        likeliest = model(text[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(text[:, -steps:], likeliest[:, -steps:])


@pytest.fixture
def silence(caplog, monkeypatch):
    """A context in which no warning is raised and nothing is logged as one."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    transformers_logging.warning_once.cache_clear()  # what an earlier test was told is said again

    @contextmanager
    def silent():
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            yield
        assert [record.getMessage() for record in caplog.records] == []

    return silent


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of 1-D rows, padded with 0 on that side."""
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    columns = torch.arange(int(lengths.max()))
    mask = columns < lengths if side == "right" else columns >= columns.numel() - lengths
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.cat(rows)
    return ids, mask.long()


@pytest.fixture
def spy(monkeypatch):
    """Record the first argument of every call of a method of the cache."""

    def install(name: str) -> list:
        calls, method = [], getattr(BMojoCache, name)

        def recorded(self, argument, *args, **kwargs):
            calls.append(argument)
            return method(self, argument, *args, **kwargs)

        monkeypatch.setattr(BMojoCache, name, recorded)
        return calls

    return install


# -- ways of decoding --------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("prompt", [1, 5, 16])
def test_greedy(tiny_model, changes, prompt):
    model, ids = tiny_model(**EXACT, **changes), random_ids(2, prompt)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), greedy(model, ids, 20))


def test_rows_that_have_ended_are_padded(tiny_model):
    model, ids = tiny_model(**EXACT), random_ids(3, 7)
    want = greedy(model, ids, 16)
    end = int(want[0, 12])
    got = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=end, pad_token_id=0)
    ended = (want[:, 7:] == end).cumsum(1).cumsum(1) > 1  # behind the first one
    assert ended[0].any()
    assert not ended.all(0).any()  # somebody goes on
    assert torch.equal(got[:, 7:], want[:, 7:].masked_fill(ended, 0))


@variants
@pytest.mark.parametrize("returned", [1, 3])
def test_sampling(tiny_model, changes, returned):
    model, ids, texts = tiny_model(**EXACT, **changes), random_ids(2, 9), []
    for use_cache in (True, False):
        torch.manual_seed(7)
        texts.append(
            model.generate(ids, max_new_tokens=16, do_sample=True, num_return_sequences=returned, use_cache=use_cache)
        )
    assert torch.equal(*texts)
    assert len(texts[0].unique(dim=0)) == 2 * returned


@variants
@pytest.mark.parametrize("returned", [1, 3])
@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_beams(tiny_model, spy, changes, returned, cache_implementation):
    model, ids = tiny_model(**EXACT, **changes), random_ids(2, 7)
    settings = {"max_new_tokens": 14, "num_beams": 4, "num_return_sequences": returned, "do_sample": False}
    orders = spy("reorder_cache")
    got = model.generate(ids, **settings, cache_implementation=cache_implementation)
    assert any(order.tolist() != sorted(order.tolist()) for order in orders)  # beams did change places
    assert torch.equal(got, model.generate(ids, **settings, use_cache=False))


def test_equal_prompts_give_equal_rows(tiny_model):
    model, ids = tiny_model(**EXACT), random_ids(1, 7)
    got = model.generate(ids.expand(3, -1), max_new_tokens=14, do_sample=False)
    assert torch.equal(got, greedy(model, ids, 14).expand(3, -1))


@variants
def test_embeddings_for_ids(tiny_model, changes):
    model, ids = tiny_model(**EXACT, **changes), random_ids(2, 11)
    got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(got, greedy(model, ids, 12)[:, 11:])


# -- padding -----------------------------------------------------------------------------------------------------------

ROWS = [random_ids(1, length, seed=length)[0] for length in (1, 4, 5, 13)]


@variants
@pytest.mark.parametrize(
    "settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}]
)
def test_left_padding(tiny_model, changes, settings):
    model = tiny_model(**EXACT, **changes)
    ids, mask = padded(ROWS, "left")
    got = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **settings)
    for row, text in zip(ROWS, got, strict=True):
        assert_greedy(model, row[None], text[None, -len(row) - 12 :], 12)


@variants
@pytest.mark.parametrize("full_mask", [False, True])
def test_right_padding(tiny_model, changes, full_mask):
    """Prompts read by the model itself, then one token at a time for each row."""
    model = tiny_model(**EXACT, **changes)
    ids, mask = padded(ROWS, "right")
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
        new = [out.logits[torch.arange(4), mask.sum(1) - 1].argmax(-1)[:, None]]
        for _ in range(11):
            mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.int64)], 1)
            step = mask if full_mask else None
            out = model(new[-1], attention_mask=step, cache=out.cache)
            new.append(out.logits[:, -1:].argmax(-1))
    for row, text in zip(ROWS, torch.cat(new, 1), strict=True):
        assert_greedy(model, row[None], torch.cat([row, text])[None], 12)


# -- caches ------------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("pads", [0, 3])
def test_three_turns(tiny_model, changes, given, pads):
    """The returned cache goes into the next turn with the whole text: only what is new is read."""
    model = tiny_model(**EXACT, **changes)
    cache = BMojoCache(model.config) if given else None
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :pads] = 0
    for turn, words in enumerate((1, 4, 8)):
        user = random_ids(2, words, seed=10 + turn)
        ids, mask = torch.cat([ids, user], 1), torch.cat([mask, torch.ones_like(user)], 1)
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, use_cache=False)
        out = model.generate(
            ids,
            attention_mask=mask,
            cache=cache,
            max_new_tokens=7,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences, plain)
        assert cache is None or cache_of(out) is cache
        ids, cache = out.sequences, cache_of(out)
        mask = torch.cat([mask, torch.ones(2, 7, dtype=torch.int64)], 1)
        assert cache.get_seq_length() == ids.shape[1] - 1  # the last token was not read yet


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(tiny_model, silence, name):
    """Whatever transformers calls it: forward and generate() take either, and say nothing of it."""
    model, ids = tiny_model(**EXACT), random_ids(2, 9)
    with silence(), torch.no_grad():
        want = model(ids, use_cache=False).logits
        for run in (model, model.model):
            cache = BMojoCache(model.config)
            first = run(ids[:, :5], **{name: cache})
            assert first.cache is cache
            rest = run(ids[:, 5:], **{name: cache}, return_dict=False)[0]
            assert rest.shape[1] == 4
            assert cache.get_seq_length() == 9
            if run is model:
                torch.testing.assert_close(torch.cat([first.logits, rest], 1), want, rtol=0, atol=1e-12)
        for settings in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 3}):
            rows = ids[:1] if "prompt_lookup_num_tokens" in settings else ids
            cache = BMojoCache(model.config)
            got = model.generate(rows, max_new_tokens=8, do_sample=False, **settings, **{name: cache})
            assert torch.equal(got, model.generate(rows, max_new_tokens=8, do_sample=False, **settings))
            assert cache.get_seq_length() == 16
    assert first.past_key_values is first.cache  # transformers 5.24 has a word to say about the first


@variants
@pytest.mark.parametrize("size", [1, 3, 4, 50])
def test_chunked_prefill(tiny_model, changes, size):
    model, ids = tiny_model(**EXACT, **changes), random_ids(2, 17)
    got = model.generate(ids, max_new_tokens=9, do_sample=False, prefill_chunk_size=size)
    assert_greedy(model, ids, got, 9)


@variants
def test_static_cache(tiny_model, changes):
    model, ids = tiny_model(**EXACT, **changes), random_ids(2, 13)
    settings = {"max_new_tokens": 15, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    static = model.generate(ids, **settings, cache_implementation="static")
    dynamic = model.generate(ids, **settings, cache_implementation="dynamic")
    assert (cache_of(static).is_compileable, cache_of(dynamic).is_compileable) == (True, False)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(static.logits, dynamic.logits, rtol=0, atol=1e-6)


def test_static_cache_has_the_room_asked_for(tiny_model):
    settings = {"max_new_tokens": 3, "cache_implementation": "static", "return_dict_in_generate": True}
    model, ids = tiny_model(**EXACT), random_ids(1, 13)
    assert cache_of(model.generate(ids, **settings)).max_cache_len == 15  # the last token is not read
    assert cache_of(model.generate(ids, **settings, max_cache_len=64)).max_cache_len == 64


@pytest.mark.parametrize("name", ["quantized", "offloaded", "offloaded_static"])
def test_other_caches_are_refused(tiny_model, name):
    with pytest.raises(
        ValueError, match=f"cache_implementation='{name}' is not supported: B'MOJO's cache is of fixed size"
    ):
        tiny_model().generate(random_ids(1, 4), max_new_tokens=2, cache_implementation=name)


def test_a_full_cache_says_so(tiny_model):
    model = tiny_model(**EXACT)
    with pytest.raises(ValueError, match="max_cache_len is 10; 10 columns are in the cache and 1 more do not fit"):
        model.generate(random_ids(1, 7), cache=BMojoCache(model.config, max_cache_len=10), max_new_tokens=6)
    cache = BMojoCache(model.config, max_cache_len=10)
    got = model.generate(random_ids(1, 7), cache=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, greedy(model, random_ids(1, 7), 4))


def test_no_cache_where_the_configuration_says_so(tiny_model):
    model, ids = tiny_model(**EXACT, use_cache=False), random_ids(2, 9)
    assert model(ids).cache is None
    out = model.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    assert cache_of(out) is None
    assert torch.equal(out.sequences, greedy(model, ids, 9))
    assert model(ids, use_cache=True).cache.get_seq_length() == 9


def test_bfloat16(tiny_model):
    model, ids = tiny_model(dtype=torch.bfloat16, eos_token_id=None, **MIXED), random_ids(2, 13)
    out = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert {tensor.dtype for name, tensor in cache_of(out).tensors().items() if name.endswith("_value")} == {
        torch.bfloat16
    }
    with torch.no_grad():
        want = copy.deepcopy(model).double()(out.sequences, use_cache=False).logits[:, 12:-1]
    got = torch.stack(out.logits, 1).double()
    assert (got - want).norm() / want.norm() < 0.05  # rounding of about 2^-8 per operation; a lost state gives about 1


# -- compilation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """Compile with full graphs and the backend `eager`; the list of graphs that were made."""
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    yield lambda model: torch.compile(model, fullgraph=True, backend=backend), graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("changes", [VARIANTS["bmojo-mamba"], MIXED, DELTAS])
@torch.no_grad()
def test_compiled_forward(tiny_model, compiled, changes):
    compile_model, graphs = compiled
    model, (ids, mask) = tiny_model(**EXACT, **changes), padded(ROWS, "left")
    fast = compile_model(model)
    for kwargs in ({}, {"attention_mask": mask}):
        got, want = fast(ids, use_cache=False, **kwargs).logits, model(ids, use_cache=False, **kwargs).logits
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("changes", "mask"), [({}, True), (VARIANTS["bmojo-mamba"], False), (MIXED, False), (DELTAS, False)]
)
@torch.no_grad()
def test_compiled_decoding(tiny_model, compiled, changes, mask):
    compile_model, graphs = compiled
    model, ids = tiny_model(**EXACT, **changes), random_ids(2, 63)
    want = model(ids, use_cache=False).logits
    fast, cache = compile_model(model), BMojoCache(model.config, max_cache_len=64)
    model(ids[:, :12], cache=cache)
    for step in range(12, 62):
        one = {"attention_mask": torch.ones(2, 1, dtype=torch.int64)} if mask else {}
        got = fast(ids[:, step : step + 1], cache=cache, **one).logits
        torch.testing.assert_close(got[:, 0], want[:, step], rtol=0, atol=1e-9)
    assert 1 <= len(graphs) <= 2


# -- drafted tokens ----------------------------------------------------------------------------------------------------

PROMPTS = [
    torch.cat([random_ids(1, 3 + i % 4, seed=i)] * (1 + i % 5), 1) for i in range(20)
]  # 3 to 30 tokens, repeated


def drafted_equals_greedy(model, crops, **settings):
    for ids in PROMPTS:
        assert_greedy(model, ids, model.generate(ids, max_new_tokens=12, do_sample=False, **settings), 12)
    assert min(crops) < 0  # some drafts were taken back
    assert 0 in crops  # and some kept whole


@variants
def test_prompt_lookup(tiny_model, spy, changes):
    drafted_equals_greedy(tiny_model(**EXACT, **changes), spy("crop"), prompt_lookup_num_tokens=4)


@variants
def test_assistant(tiny_model, spy, changes):
    model = tiny_model(**EXACT, **changes)
    assistant = copy.deepcopy(model)  # disturbed, so that it is right now and then
    generator = torch.Generator().manual_seed(1)
    for parameter in assistant.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += 0.05 * parameter.std() * noise if parameter.numel() > 1 else 0
    drafted_equals_greedy(model, spy("crop"), assistant_model=assistant)


def test_an_unrelated_assistant(tiny_model):
    model, assistant = tiny_model(**EXACT), tiny_model(**EXACT, seed=1, num_hidden_layers=1, sliding_window=3)
    for ids in PROMPTS[:8]:
        got = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=assistant)
        assert_greedy(model, ids, got, 12)


def test_drafts_in_a_static_cache(tiny_model, spy):
    """It rolls back as well, and generate() compiles nothing while it keeps a log."""
    model, crops = tiny_model(**EXACT, **MIXED), spy("crop")
    for ids in PROMPTS[:4]:
        cache = BMojoCache(model.config, max_cache_len=ids.shape[1] + 12 + 4)  # drafts that are not kept
        got = model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4, cache=cache)
        assert_greedy(model, ids, got, 12)
    assert any(crops)
    fresh = BMojoCache(model.config, max_cache_len=8)
    assert fresh.is_compileable
    fresh.activate_past_recording()
    assert not fresh.is_compileable


def test_drafts_need_no_more_room_than_they_keep(tiny_model):
    model = tiny_model(**EXACT, layers_block_type=["full_attention", "bmojo"])
    out = model.generate(
        PROMPTS[3], max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4, return_dict_in_generate=True
    )
    plain = model.generate(PROMPTS[3], max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain.sequences)
    assert cache_of(out).num_bytes() == cache_of(plain).num_bytes()


# -- the rest of the interface -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_to_keep(tiny_model):
    model, ids = tiny_model(dtype=torch.float64), random_ids(2, 12)
    want = model(ids).logits
    assert want.shape[1] == 12
    for keep in (1, 5, 12):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, want[:, -keep:], rtol=0, atol=1e-12)
    chosen = torch.tensor([0, 7, 3])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, want[:, chosen], rtol=0, atol=1e-12)


def test_generation_projects_the_last_token_only(tiny_model):
    model, lengths = tiny_model(**EXACT), []
    model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    model.generate(random_ids(1, 30), max_new_tokens=3)
    assert lengths == [1, 1, 1]


def test_streamer(tiny_model):
    class Collect(BaseStreamer):
        def __init__(self):
            self.parts, self.ended = [], False

        def put(self, value):
            self.parts.append(value.flatten())

        def end(self):
            self.ended = True

    model, ids, streamer = tiny_model(**EXACT), random_ids(1, 6), Collect()
    model.generate(ids, max_new_tokens=9, do_sample=False, streamer=streamer)
    assert streamer.ended
    assert [len(part) for part in streamer.parts] == [6] + [1] * 9
    assert torch.equal(torch.cat(streamer.parts), greedy(model, ids, 9)[0])


def test_pipeline_is_silent(tiny_model, silence, monkeypatch):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT)
    model = tiny_model(vocab_size=4096, dtype=torch.float64, eos_token_id=tokenizer.eos_token_id)
    assert (tokenizer.pad_token_id, tokenizer.padding_side, len(tokenizer)) == (
        model.config.pad_token_id,
        "left",
        4096,
    )
    # what loading by AutoModelForCausalLM does for code from the model's repository
    monkeypatch.setattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", {BMojoConfig: BMojoForCausalLM})
    prompts = ["Once upon a time", "The", "A longer prompt than the others, with more words in it.", "0 1 2", "It was"]
    with silence():
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        answers = generator(prompts, batch_size=4, max_new_tokens=8, do_sample=False, return_full_text=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = greedy(model, ids, 8)[0, ids.shape[1] :]
        assert answer[0]["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("word", ["mamba", "rwkv", "reformer", "xlstm", "minimax"])
def test_generate_does_not_take_the_class_for_another(word):
    """By such words in the class's name transformers renames or drops the cache."""
    assert word not in BMojoForCausalLM.__name__.lower()
    assert BMojoForCausalLM._supports_default_dynamic_cache()


@variants
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_long_prompts_are_read_in_pieces(tiny_model, monkeypatch, changes, side):
    """In a cached call without gradients: the same logits and the same cache, for padded batches too."""
    model = tiny_model(dtype=torch.float64, **changes)
    rows = [random_ids(1, length, seed=length)[0] for length in (45, 20, 3)]
    ids, mask = (random_ids(3, 45), None) if side == "none" else padded(rows, side)
    calls = []
    model.model.layers[0].register_forward_hook(lambda layer, inputs, output: calls.append(output[0].shape[1]))
    outputs = {}
    for piece in (7, 1000):
        monkeypatch.setattr(type(model.model), "prefill_piece", piece)
        with torch.no_grad():
            outputs[piece] = model(ids, attention_mask=mask)
            outputs[piece].next = model(ids[:, :2], cache=outputs[piece].cache).logits
    assert calls == [7] * 6 + [3] + [2] + [45] + [2]
    assert torch.allclose(outputs[7].logits, outputs[1000].logits, rtol=0, atol=1e-12)
    assert torch.allclose(outputs[7].next, outputs[1000].next, rtol=0, atol=1e-12)
    for name, tensor in outputs[7].cache.tensors().items():
        assert tensor.shape == outputs[1000].cache.tensors()[name].shape
    assert outputs[7].cache.get_seq_length() == 47
    assert torch.equal(outputs[7].cache.lengths, outputs[1000].cache.lengths)


LAST_LAYERS = {
    "bmojo": {},
    "bmojo, rank, untied, fading query": {"eidetic_position": "rank", "tie_attn_weights": False, "fading_query": True},
    "bmojo-f": {"eidetic_size": 0},
    "bmojo without fading span": {"fading_span": False, "innovation_predictor": "random"},
    **{
        kind: {"layers_block_type": ["bmojo", kind]}
        for kind in ("mamba", "mamba2", "gated_deltanet", "gated_kalmanet")
    },
    **{kind: {"layers_block_type": ["bmojo", kind]} for kind in ("sliding_attention", "full_attention", "hybrid")},
}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("last", LAST_LAYERS)
@torch.no_grad()
def test_where_one_logit_is_wanted_the_last_layer_only_keeps_state_for_the_others(tiny_model, monkeypatch, last, side):
    """The prompt's last token has a step of its own then: the same logits and cache, for padded batches too."""
    model = tiny_model(dtype=torch.float64, **LAST_LAYERS[last])
    ids, mask = random_ids(3, 45), None
    if side != "none":
        ids, mask = padded([random_ids(1, length, seed=length)[0] for length in (45, 20, 3)], side)
    seen = []
    model.model.layers[-1].mlp.register_forward_hook(lambda mlp, inputs, output: seen.append(output.shape[1]))
    monkeypatch.setattr(type(model.model), "prefill_piece", 1000)
    whole = model(ids, attention_mask=mask, logits_to_keep=1)
    assert seen == [45]  # a short prompt is read at once
    monkeypatch.setattr(type(model.model), "prefill_apart", 40)
    for piece in (7, 1000):
        monkeypatch.setattr(type(model.model), "prefill_piece", piece)
        seen.clear()
        out = model(ids, attention_mask=mask, logits_to_keep=1)
        if side == "right":  # the last column is padding: nothing says that its output is not wanted
            assert sum(seen) == 45
        else:
            assert seen == [1]
            torch.testing.assert_close(out.logits, whole.logits, rtol=0, atol=1e-12)
        assert torch.equal(out.cache.lengths, whole.cache.lengths)
        assert out.cache.get_seq_length() == 45
        for name, tensor in whole.cache.tensors().items():
            assert out.cache.tensors()[name].shape == tensor.shape
        seen.clear()
        silent = model.model(ids, attention_mask=mask, outputs_to_keep=0)
        assert (silent.last_hidden_state.shape[1], seen) == (0, [])
        want = model(ids[:, :5], cache=model(ids, attention_mask=mask).cache).logits
        for cache in (out.cache, silent.cache):
            torch.testing.assert_close(model(ids[:, :5], cache=cache).logits, want, rtol=0, atol=1e-12)


@torch.no_grad()
def test_what_else_is_asked_for_is_made_for_all_tokens(tiny_model, monkeypatch):
    model, ids = tiny_model(dtype=torch.float64), random_ids(2, 45)
    monkeypatch.setattr(type(model.model), "prefill_apart", 40)
    everything = model(ids)
    for wish in ({"output_hidden_states": True}, {"output_eidetic": True}, {"use_cache": False}):
        out = model(ids, logits_to_keep=1, **wish)
        torch.testing.assert_close(out.logits, everything.logits[:, -1:], rtol=0, atol=1e-12)
        if "output_hidden_states" in wish:
            assert [part.shape for part in out.hidden_states] == [(2, 45, 24)] * 3
        if "output_eidetic" in wish:
            assert out.innovations[-1].shape == (2, 45)
            assert torch.equal(out.eidetic_positions[-1], model(ids, output_eidetic=True).eidetic_positions[-1])
    want = model.model(ids, use_cache=False).last_hidden_state
    for keep in (0, 1, 3, 45, 60):
        for use_cache in (True, False):
            kept = model.model(ids, outputs_to_keep=keep, use_cache=use_cache).last_hidden_state
            torch.testing.assert_close(kept, want[:, max(0, 45 - keep) :], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="0 or more"):
        model.model(ids, outputs_to_keep=-1)
    with torch.enable_grad():
        model.train()
        model(ids, logits_to_keep=1).logits.sum().backward()
    assert model.model.layers[-1].mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("rows", [1, 2])
def test_a_filled_cache_is_gone_on_from_or_refused(tiny_model, rows):
    """All tokens, or the new ones with a mask for all: as without cache. Where nothing is left to read, or tokens are missing: an error."""
    model, ids = tiny_model(**EXACT), random_ids(rows, 19)
    settings = {"max_new_tokens": 9, "do_sample": False}
    want = model.generate(ids, **settings)

    def filled():
        return {CACHE_NAME: model(ids[:, :15], use_cache=True).cache}

    assert torch.equal(model.generate(ids, **filled(), **settings), want)
    mask = torch.ones_like(ids)
    assert torch.equal(model.generate(ids[:, 15:], attention_mask=mask, **filled(), **settings), want[:, 15:])
    if rows == 1:  # assisted decoding hands over all tokens in its first step
        assert torch.equal(model.generate(ids, **filled(), prompt_lookup_num_tokens=3, **settings), want)
    for wrong in (ids[:, :15], ids[:, :7], ids[:, 15:18]):
        with pytest.raises(
            ValueError, match=r"The cache holds 15 tokens of each row, of .* pass all tokens, more than it"
        ):
            model.generate(wrong, **filled(), **settings)


def test_generate_takes_a_tokenizer_for_stop_strings(tiny_model):
    """For the tokenizer is handed on to the model's forward, which has no use for it."""
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT), trust_remote_code=True)
    model = tiny_model(vocab_size=len(tokenizer), **EXACT)
    ids = random_ids(1, 8)
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    stop = tokenizer.decode(want[0, 10:11])
    got = model.generate(ids, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert torch.equal(got, want[:, : got.shape[1]])
    assert got.shape[1] <= 11


def test_continuous_batching_is_refused(tiny_model):
    model = tiny_model()
    for run in (
        lambda: model.generate(random_ids(1, 5), max_new_tokens=3, cache_implementation="paged"),
        lambda: model.generate_batch([[3, 4, 5]]),
        lambda: model.init_continuous_batching(),
    ):
        with pytest.raises(NotImplementedError, match=r"Continuous batching .* Pass a padded batch to generate\(\)"):
            run()
