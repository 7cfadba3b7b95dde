"""Small T5s of every kind, made with transformers."""

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    PreTrainedTokenizerFast,
    T5Config,
    T5GemmaConfig,
    T5GemmaModuleConfig,
    UMT5Config,
)

from dsvae import T5VAE, T5VAEConfig
from dsvae.modeling.families import CategoricalFamily, GaussianFamily, SpikeSlabFamily
from dsvae.modeling.t5_vae import CACHE

SMALL = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 12,  # not d_model / num_heads
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.0,
}

T5_CONFIGS = {
    "t5 v1.0": lambda: T5Config(**SMALL),
    "t5 v1.1": lambda: T5Config(**SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: MT5Config(**SMALL, feed_forward_proj="gated-gelu"),
    "umt5": lambda: UMT5Config(**SMALL, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
GEMMA_SIDE = {
    "vocab_size": 60,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 4,  # shorter than the sentences
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
}
INJECTIONS = ("memory", "embedding", "both", "cross")
FAMILIES = {
    "gaussian": GaussianFamily(3),
    "spike_slab": SpikeSlabFamily(3, (4.0, 1.0)),
    "categorical": CategoricalFamily(3, 4),
}
POOLINGS = ("mean", "max", "first", "attention")


def all_pairs(first, second, third):
    """Combinations of three lists in which any two values of different lists meet: a Latin
    square, where a test of every combination would take several times as long."""
    first, second, third = list(first), list(second), list(third)
    size = max(len(first), len(second), len(third))
    places = {
        (a % len(first), b % len(second), (a + b) % len(third)): None
        for a in range(size)
        for b in range(size)
    }
    return [(first[a], second[b], third[c]) for a, b, c in places]


def t5gemma_config(**side):
    """An encoder that is larger than the decoder, as in 9b-2b.

    Args:
        side: takes the place of fields of both stacks.
    """
    side = GEMMA_SIDE | side
    encoder = T5GemmaModuleConfig(**side, hidden_size=40, intermediate_size=56, num_hidden_layers=2)
    decoder = T5GemmaModuleConfig(**side, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    return T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=side["vocab_size"])


def make_t5gemma(directory):
    """Saves a random T5Gemma as the hub has it."""
    torch.manual_seed(7)
    model = AutoModelForSeq2SeqLM.from_config(t5gemma_config())
    for name, weight in model.named_parameters():
        weight.data.normal_(0, 0.1 if "norm" in name else 0.3)
    model.save_pretrained(directory)
    return directory


def decoded_by_the_cache(model, tokens, **given):
    """The logits of tokens (B, T) that are decoded one after the other."""
    cache, steps = None, []
    for token in tokens.split(1, dim=1):
        out = model(decoder_input_ids=token, cache=cache, use_cache=True, **given)
        cache = out[CACHE]
        steps.append(out.logits)
    return torch.cat(steps, dim=1)


def plain_nats(logits, labels):
    """-log p of each sentence, (B,), by torch's own loss on all logits at once."""
    nats = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return nats.view(labels.shape).sum(1)


def make_t5(kind, directory):
    """Saves a random T5 of a kind as the hub has it: v1.1, mT5 and umT5 with an lm_head
    of their own."""
    torch.manual_seed(7)
    model = AutoModelForSeq2SeqLM.from_config(T5_CONFIGS[kind]())
    state = {
        name: torch.randn_like(w) * (0.3 if w.ndim > 1 else 0.1) + (w.ndim == 1)
        for name, w in model.state_dict().items()
    }
    state = {name: w for name, w in state.items() if ".embed_tokens." not in name}
    if kind == "t5 v1.0":
        state["lm_head.weight"] = state["shared.weight"]
    model.config.save_pretrained(directory)
    if kind != "t5 v1.0":  # transformers writes True whatever it was; the released files say false
        path = directory / "config.json"
        path.write_text(
            path.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
        )
    if kind == "t5 v1.0":
        del state["lm_head.weight"]
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


def make_vae(kind="t5 v1.0", seed=0, **latent):
    """A small T5VAE with weights large enough for every path to matter."""
    torch.manual_seed(seed)
    options = {"latent_dim": 6, "memory_slots": 2, **latent}
    if kind == "t5gemma":
        t5, options = t5gemma_config(), {"injection": "cross", **options}
    else:
        t5 = T5_CONFIGS[kind]()
    model = T5VAE(T5VAEConfig(t5=t5, **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" not in name:
                weight.normal_(0.0, 0.25)
    return model.eval()


def small_tokenizer(texts, size=SMALL["vocab_size"]):
    """A tokenizer in T5's manner of at most `size` pieces; a character that the texts
    do not have is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
