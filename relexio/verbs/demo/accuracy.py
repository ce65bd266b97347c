"""Task accuracy of a demo checkpoint: exact answers, greedy. Needs torch and transformers, which relexio does not."""

from importlib.util import find_spec
from pathlib import Path


def available() -> bool:
    """Whether torch and transformers are installed."""
    return find_spec("torch") is not None and find_spec("transformers") is not None


def accuracy(checkpoint: Path, problems: list[tuple[str, str]]) -> float:
    """The share of problems that the checkpoint answers exactly."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    prompts = [prompt for prompt, _ in problems]
    tokens = tokenizer(prompts, return_tensors="pt", add_special_tokens=False)["input_ids"]  # all of one length
    longest = max(len(answer) for _, answer in problems)
    with torch.inference_mode():
        output = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=longest + 1, do_sample=False
        )
    texts = tokenizer.batch_decode(output[:, tokens.shape[1] :], skip_special_tokens=True)
    right = sum(text.strip() == answer for text, (_, answer) in zip(texts, problems, strict=True))
    return right / len(problems)
