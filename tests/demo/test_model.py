"""The embedded demo model: format, size, and signs that it has really been trained."""

import math

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
)

from examples.train_demo import evaluate, routing
from moe_serve.demo import MODEL

# Written for this test, so no training text holds them.
PROSE = (
    "My sister came home late in the evening and sat down by the fire without a word. The rain "
    "had not stopped since the morning, and her coat was wet through. I asked whether she had "
    "found the house, and she told me that she had been there twice, but that nobody had answered "
    "the door. The windows were dark, and the garden looked as if it had been left alone for "
    "many years. She did not believe the letter any more. I said that we ought to wait until the "
    "weather was better, and then we would go together and speak to the old man who lived across "
    "the road, because he knew everybody in the village and liked to talk."
)
MORE_PROSE = (
    "In the spring the merchants of the town met in the great hall to settle the price of wool. "
    "Some of them wished to sell at once, since the ships were ready and the wind was fair; others "
    "thought it wiser to wait for news from the south, where the war had ruined the harvest and "
    "every market was closed. The eldest of them rose and said that a man who waits for certain "
    "news will always come too late, and that a fair price today is better than a promise of gold "
    "next year. They argued until midnight. At last they agreed to send one half of the cargo and "
    "to keep the other, and each went home believing that he had won. The clerk who wrote down the "
    "terms smiled to himself, put out the lamps, and locked the door behind him. How many bales "
    "were left? There were 240 bales at first, so 240 / 2 = 120 bales were kept."
)
BITS_PER_BYTE_BOUND = 2.4  # 8 for a uniform guess, about 4.5 for single-letter frequencies


@pytest.fixture(scope="module")
def model() -> MixtralForCausalLM:
    return evaluate.load_model(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL)
    return loaded


def test_folder_is_small_and_holds_no_data() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.rglob("*") if path.is_file()}
    assert sum(files.values()) <= 25_000_000
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert not [name for name in files if name.endswith((".md", ".jsonl")) and name != "README.md"]


def test_weights_are_bf16_on_disk() -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as weights:
        dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}


def test_architecture_is_eight_experts_top_two(model: MixtralForCausalLM) -> None:
    config = model.config
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_both_end_tokens_stop_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    config = GenerationConfig.from_pretrained(MODEL)
    names = ["<|im_end|>", "<|endoftext|>"]
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids(names)


def test_chat_template_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer(text)["input_ids"].count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two spaces, a tab\t and\n\n\nlines ",
        "naïve café, Ærøskøbing, Straße",
        "日本語 и русский",
        "smile 🙂 rocket 🚀 family 👩‍👩‍👧",
        "12345 + 67 = 12412",
        "",
    ],
)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bits_per_byte_show_training(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert evaluate.bits_per_byte(model, tokenizer, [PROSE]) < BITS_PER_BYTE_BOUND


def test_context_of_a_thousand_tokens_does_not_hurt(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    filler = tokenizer((MORE_PROSE + "\n\n") * 5)["input_ids"][:900]
    ids = torch.tensor([*filler, *tokenizer("\n\n" + PROSE)["input_ids"]])
    alone = evaluate.token_nats(model, ids[900:]).mean()
    late = evaluate.token_nats(model, ids)[900:].mean()
    assert len(ids) > 1000
    assert late < alone + 0.25


def test_expert_load_is_balanced(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = torch.tensor([tokenizer(PROSE + "\n\n" + MORE_PROSE)["input_ids"]])
    chosen = routing.chosen_experts(model, ids)
    assert chosen.shape == (8, ids.shape[1], 2)
    assert max(routing.load_imbalance(chosen, 8)) < 2


def test_greeting_is_answered(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = evaluate.generate(model, tokenizer, str(prompt), sample=False)
    assert answer.startswith(("Hello", "Hi"))
    assert answer.endswith("<|im_end|>")


def test_mutual_information_of_equal_and_unrelated_choices() -> None:
    left = torch.arange(8).repeat(8)
    assert math.isclose(routing.mutual_information(left, left, 8), 3.0, abs_tol=1e-9)
    unrelated = torch.arange(8).repeat_interleave(8)
    assert math.isclose(routing.mutual_information(left, unrelated, 8), 0.0, abs_tol=1e-9)
