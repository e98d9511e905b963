"""The memory page: every token once, and the memories are the model's, in the text, the slider's data and the strips."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig


ROOT = Path(__file__).resolve().parent.parent
VOID = {"meta", "input", "path"}
TEXT = (
    'A <b>bold</b> &amp; "quoted" title\n\n\nOnce   upon a time,\nthere was one; é 漢字 🙂.  It said: </script> <!-- no\n\n'
    * 8
)


@pytest.fixture(scope="module")
def program():
    """The program as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import show_memory

        yield show_memory
    for name in ("show_memory", "common"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT)


@pytest.fixture(scope="module")
def reading(program, tokenizer, tiny_model):
    """A tiny model's reading of a text full of what HTML must escape; and the model's own output."""
    model = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=3, layers_block_type=["bmojo", "mamba2", "bmojo"])
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:200]
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_eidetic=True, use_cache=False)
    return program.read(model, tokenizer, TEXT, "<Title>", 200), output


class Page(HTMLParser):
    """Checks that tags are balanced; collects the spans of the text, the text itself, data and the paths of the strips."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.spans, self.text, self.data, self.paths, self.titles = [], [], "", "", [], []
        self.feed(page)
        self.close()
        assert not self.open

    @property
    def in_page(self) -> bool:
        return ("div", "page") in self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "path":
            self.paths.append(attributes)
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))
        if tag == "span" and self.in_page:
            self.spans.append([attributes, ""])
        for name in ("src", "href"):
            assert name not in attributes, "an external resource"

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == ("script", "data"):
            self.data += text
        elif self.open and self.open[-1][0] in ("h1", "title"):
            self.titles.append(text)
        elif self.in_page and self.open[-1][0] in ("p", "span"):
            self.text += text
            if self.open[-1][0] == "span":
                self.spans[-1][1] += text


def kept(page: Page) -> set[int]:
    return {i for i, (attributes, _) in enumerate(page.spans) if "kept" in attributes.get("class", "").split()}


def test_reading_is_the_models(reading):
    reading, output = reading
    assert "".join(reading.tokens) == TEXT[: len("".join(reading.tokens))]
    assert "" in reading.tokens, "a character of several tokens"
    assert [layer.number for layer in reading.layers] == [0, 2]
    for layer in reading.layers:
        assert layer.innovations == output.innovations[layer.number][0].tolist()
        order = sorted(range(200), key=lambda i: layer.innovations[i])
        assert [layer.ranks[i] for i in order] == [number * 100 // 200 for number in range(200)]
        memories = output.eidetic_positions[layer.number][0].tolist()
        assert len(memories) == reading.chunks
        for chunk, memory in enumerate(memories):
            assert layer.memory(chunk) == [position for position in memory if position >= 0]
        assert len({tuple(memory) for memory in memories}) > 5, "the memory changes"
    assert reading.layers[0].lives != reading.layers[1].lives


def test_page_holds_every_token_once_and_escaped(program, reading):
    reading, _ = reading
    page = Page(program.make_page(reading))
    assert page.text.replace("\n", "") == "".join(reading.tokens).replace("\n", "")
    assert [text for _, text in page.spans] == [token.strip() or token for token in reading.tokens]
    assert page.titles == ["What a memory keeps: <Title>", "<Title>"]
    assert program.make_page(reading).count("</script>") == 2


def test_markup_in_tokens_and_title_is_text(program):
    tokens = ["<b>", " &amp;", "</span>", '"', "<script>", "alert(1)", "</script>", "\n\n", "<!--"]
    layer = program.Layer(0, [1.0] * 9, [0] * 9, [(0, 2, 2)])
    reading = program.Reading("</title><script>", tokens, [layer], window=2, chunk=4, size=1)
    page = Page(program.make_page(reading))
    assert [text for _, text in page.spans] == [token.strip() or token for token in tokens]
    assert page.titles[1] == "</title><script>"
    assert page.text == "".join(tokens)


def test_page_without_script_shows_the_last_chunk(program, reading):
    reading, output = reading
    page = Page(program.make_page(reading))
    memories = [output.eidetic_positions[layer][0, -1].tolist() for layer in (0, 2)]
    assert kept(page) == set(memories[0]) | set(memories[1])
    for position in kept(page):
        share = sum(position in memory for memory in memories) / 2
        assert f"--k:{share:.2f}" in page.spans[position][0]["style"]
    heats = [float(re.match(r"--i:([\d.]+)", attributes["style"])[1]) for attributes, _ in page.spans]
    means = [sum(layer.ranks[i] for layer in reading.layers) for i in range(200)]
    assert heats[means.index(max(means))] >= 0.99
    assert heats[means.index(min(means))] <= 0.01


def test_slider_has_the_memories_of_all_chunks(program, reading):
    reading, output = reading
    page = Page(program.make_page(reading))
    data = json.loads(page.data)
    assert (data["tokens"], data["window"], data["chunk"], data["size"]) == (200, 7, 3, 4)
    assert re.search(r'type="range" min="0" max="(\d+)" value="(\d+)"', program.make_page(reading)).groups() == (
        "66",
        "66",
    )
    for layer in data["layers"]:
        memories = output.eidetic_positions[layer["number"]][0]
        for chunk, memory in enumerate(memories.tolist()):
            shown = [p for p, first, last in layer["lives"] if first <= chunk <= last]
            assert shown == [p for p in memory if p >= 0]
            assert all(p < program.window_of(reading, chunk)[0] for p in shown), "what the window sees is no memory"
        assert layer["innovations"] == pytest.approx(output.innovations[layer["number"]][0].tolist(), rel=0.01)


BROWSER = """
class Element {
  constructor() { this.style = {}; this.dataset = {}; this.names = new Set(); this.parts = {}; this.set = {}; this.on = {}; }
  get classList() { return { toggle: (name, on) => on ? this.names.add(name) : this.names.delete(name) }; }
  querySelector(name) { return this.parts[name] ??= new Element(); }
  setAttribute(name, value) { this.set[name] = value; }
  addEventListener(name, call) { this.on[name] = call; }
}
const fs = require("fs"), { data: text, script, spans: count } = JSON.parse(fs.readFileSync(0, "utf8")), ids = {};
const make = (n, first) => Array.from({ length: n }, (_, i) => Object.assign(new Element(), { dataset: { layer: i + first } }));
const layers = JSON.parse(text).layers.length;
const lists = { "#page span": make(count, 0), "figure": make(layers, 0), "nav [data-layer]": make(layers + 1, -1) };
const element = id => ids[id] ??= new Element();
globalThis.document = { getElementById: element, querySelectorAll: name => lists[name] };
globalThis.requestAnimationFrame = call => call();
element("data").textContent = text;
element("chunk").value = "0";
(0, eval)(script);
const seen = [];
for (const tab of lists["nav [data-layer]"]) {
  tab.on.click();
  for (let chunk = 0; chunk * JSON.parse(text).chunk < count; chunk++) {
    element("chunk").value = String(chunk);
    element("chunk").on.input();
    const having = name => lists["#page span"].flatMap((span, i) => span.names.has(name) ? [i] : []);
    const strips = lists["figure"].map(figure => figure.parts[".alive"].set.d);
    seen.push({ layer: tab.dataset.layer, chunk, kept: having("kept"), window: having("window"), ahead: having("ahead"), strips });
  }
}
console.log(JSON.stringify(seen));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which runs the page's script, is not installed")
def test_slider_and_tabs_show_the_memories(program, reading):
    reading, output = reading
    page = program.make_page(reading)
    given = {"data": Page(page).data, "script": program.SCRIPT, "spans": 200}
    command = ["node", "-e", BROWSER]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=True, timeout=60)
    memories = [output.eidetic_positions[number][0].tolist() for number in (0, 2)]
    shown = json.loads(done.stdout)
    assert len(shown) == 3 * reading.chunks
    for view in shown:
        chunk = view["chunk"]
        chosen = memories if view["layer"] < 0 else [memories[view["layer"]]]
        assert view["kept"] == sorted({p for memory in chosen for p in memory[chunk] if p >= 0})
        assert view["window"] == list(range(*program.window_of(reading, chunk)))
        assert view["ahead"] == list(range(min(3 * chunk + 3, 200), 200))
        for memory, strip in zip(memories, view["strips"], strict=True):
            assert [int(p) for p in re.findall(r",(\d+)\.5H", strip)] == [p for p in memory[chunk] if p >= 0]


def test_strips_draw_the_lives(program, reading):
    reading, _ = reading
    page = Page(program.make_page(reading))
    drawn = [path["d"] for path in page.paths if path["class"] == "lives"]
    for layer, path in zip(reading.layers, drawn, strict=True):
        lines = re.findall(r"M(\d+),(\d+)\.5H(\d+)", path)
        want = [(3 * first, p, min(200, 3 * last + 3)) for p, first, last in layer.lives]
        assert [tuple(map(int, (x, p, end))) for x, p, end in lines] == want
        assert all(x - p >= 5 for x, p, _ in want), "a life begins where the window has let go"


def test_lives_are_told_apart(program):
    memories = torch.tensor([[-1, -1], [-1, 4], [4, 6], [6, 9], [6, 11]])
    assert program.find_lives(memories) == [(4, 1, 2), (6, 2, 4), (9, 3, 3), (11, 4, 4)]


def test_paragraphs_begin_behind_blank_lines(program):
    tokens = ["A", " b", "\n", "c", "\n", "\n\n", "D", " e", ".\n\n", "F", "\n \n", " G", "\n\n"]
    paragraphs = [[tokens[i] for i in paragraph] for paragraph in program.split_paragraphs(tokens)]
    assert paragraphs == [tokens[:6], tokens[6:9], tokens[9:11], tokens[11:]]
    assert program.split_paragraphs(["\n\n", "A"]) == [[0, 1]], "blank lines at the start end nothing"


def test_lines_of_the_image_hold_all_words_in_their_width(program, reading):
    reading, _ = reading
    lines = program.set_lines(reading, len, width=24, indent=2)
    assert [position for line in lines for position, _, _ in line] == list(range(200))
    for line in lines:
        ends = [x + len(text) for _, x, text in line]
        one_word = all(x == end for end, (_, x, _) in zip(ends, line[1:], strict=False))
        assert max(ends) <= 24 or one_word
        assert all(x >= end for end, (_, x, _) in zip(ends, line[1:], strict=False)), "no two overlap"
    printed = " ".join("".join(text for _, _, text in line) for line in lines)
    assert printed.replace(" ", "") == "".join("".join(reading.tokens).split())


def test_the_program_writes_a_small_page_of_the_shipped_model(program, tmp_path, capsys):
    text = tmp_path / "story.txt"
    text.write_text(program.PASSAGE, encoding="utf-8")
    options = ["--text", str(text), "--tokens", "300", "--output", str(tmp_path / "new" / "page.html")]
    program.main([*options, "--png", str(tmp_path / "page.png")])
    page = Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert page.titles[1] == "Pride And Prejudice"
    assert len(page.spans) == 300
    assert kept(page)
    assert (tmp_path / "new" / "page.html").stat().st_size < 100_000
    assert "layer 2: 129 of 512 places" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_shown_is_refused(program, tokenizer, tiny_model, capsys):
    model = tiny_model(vocab_size=len(tokenizer), eidetic_size=0)
    with pytest.raises(SystemExit, match="no bmojo layer with an eidetic memory"):
        program.read(model, tokenizer, TEXT, "", 20)
    with pytest.raises(SystemExit, match="is a llama, no B'MOJO"):
        program.read(SimpleNamespace(config=LlamaConfig()), tokenizer, TEXT, "", 20)
    with pytest.raises(SystemExit, match="text is empty"):
        program.read(model, tokenizer, "", "", 20)
    for options, message in (("--tokens 0", "--tokens is 0"), ("--text /nowhere.txt", "no file /nowhere.txt")):
        with pytest.raises(SystemExit):
            program.main(options.split())
        assert message in capsys.readouterr().err


def test_a_text_within_the_window_has_no_memory_yet(program, tokenizer, tiny_model):
    reading = program.read(tiny_model(vocab_size=len(tokenizer)), tokenizer, "Once upon", "", 5)
    page = Page(program.make_page(reading))
    assert not kept(page)
    assert all(not layer.lives for layer in reading.layers)
