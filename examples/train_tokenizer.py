"""Train the byte-level BPE tokenizer of the shipped model on a folder of text files.

The tokenizer adds no special token of its own accord and gives back every text exactly:
``decode(encode(text)) == text``. The files it writes, ``tokenizer.json`` and ``tokenizer_config.json``, are what
``AutoTokenizer`` loads.

Command that made the shipped one (15 seconds on two CPU cores):

    python examples/train_tokenizer.py --data data/pg19/train --output . --vocab-size 4096 --test-data data/pg19/validation
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from common import find_text_files, read_text, save_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>"]  # ids 0, 1, 2

# A merge never crosses these borders: contractions, words and numbers (three digits at most) with the blank or quotation
# mark before them, punctuation with the line breaks after it; of several blanks the last one belongs to the word that follows.
SPLIT_PATTERN = (
    r"['\u2019]\p{Ll}{1,2}(?!\p{L})|[ \"_]?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+\n*|\n+|[^\S\n]+(?=\s|$)|\s"
)


def iterate_paragraphs(files: list[Path], lines: int = 64) -> Iterator[str]:
    """Yield the texts in pieces of ``lines`` lines, so that the trainer's threads share the work."""
    for path in files:
        parts = read_text(path).splitlines(keepends=True)
        for start in range(0, len(parts), lines):
            yield "".join(parts[start : start + lines])


def train_tokenizer(files: list[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``vocab_size`` tokens, the special ones included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(iterate_paragraphs(files), trainer, length=None)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def check_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Return the number of tokens of ``text``; raise where decoding does not give the text back."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.decode(ids) != text:
        raise SystemExit("The tokenizer does not give a text back exactly; it was not written.")
    return len(ids)


def main():
    """Train, check the round trip, measure the compression, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of .txt or .txt.gz files to train on")
    parser.add_argument(
        "--output", required=True, help="folder that receives tokenizer.json and tokenizer_config.json"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of tokens, special ones included")
    parser.add_argument("--test-data", help="folder of texts to measure bytes per token on (default: --data)")
    args = parser.parse_args()

    minimum = len(SPECIAL_TOKENS) + 256
    if args.vocab_size < minimum:
        parser.error(f"--vocab-size {args.vocab_size} is below {minimum}: 256 bytes and the special tokens.")
    tokenizer = train_tokenizer(find_text_files(args.data), args.vocab_size)
    for text in ("", " ", "\n\n  \t\r\n", "don't  stop , 12345 naïve café 你好 🙂\x00 <|eos|>", " .  ,\n 's"):
        check_round_trip(tokenizer, text)
    num_bytes = num_tokens = 0
    for path in find_text_files(args.test_data or args.data):
        text = read_text(path)
        num_bytes += len(text.encode())
        num_tokens += check_round_trip(tokenizer, text)
    if not num_tokens:
        raise SystemExit(f"The texts in {args.test_data or args.data} are empty; the tokenizer was not written.")
    save_tokenizer(tokenizer, args.output)
    print(
        f"{len(tokenizer)} tokens; {num_bytes:,} bytes in {num_tokens:,} tokens: {num_bytes / num_tokens:.3f} bytes per token"
    )


if __name__ == "__main__":
    main()
