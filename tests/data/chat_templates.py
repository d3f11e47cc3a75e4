"""Small chat templates that behave as the well-known ones do, and tokenizers that know their special tokens."""

from tests.data.data_helpers import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson) ~ '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Tools stand in a system turn, as in Qwen 2.5's.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
) + CHATML
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ (m.content | trim) ~ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# A system turn is merged into the first user's; the assistant is called model; the end mark is not the eos token.
GEMMA = (
    "{{ bos_token }}{% set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}"
    "{{ system if loop.first else '' }}{{ m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No generation prompt: the answer begins behind the closing bracket.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"
)
# Reasoning of earlier turns is left out; the last one gets an empty one.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% set reasoning = m.reasoning_content or (parts[0].split('<think>')[-1] if parts | length > 1 else '') %}"
    "{% if loop.last %}{{ '<think>\n' ~ reasoning.strip() ~ '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].strip() }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Reasoning is left out everywhere, and a prompt opens it.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|User|>' ~ m.content }}"
    "{% else %}{{ '<|Assistant|>' ~ m.content.split('</think>')[-1].strip() ~ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# The whole conversation has an end mark of its own, which every prefix has too.
PHI35 = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The last answer ends with a mark of its own; reasoning stands in a channel and is left out of earlier turns.
GPT_OSS = (
    "{% for m in messages %}{{ '<|start|>' ~ m.role }}"
    "{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}"
    "{{ '<|channel|>analysis<|message|>' ~ m.thinking ~ '<|end|><|start|>assistant' }}{% endif %}"
    "{{ '<|channel|>final<|message|>' ~ m.content ~ ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# Markers around the content alone; the last turn, and no other, gets an empty reasoning.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
# Plain words, no special token at all.
PLAIN = (
    "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIALS = {
    CHATML: ["<|im_start|>", "<|im_end|>"],
    TOOLS: ["<|im_start|>", "<|im_end|>"],
    LLAMA3: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    GEMMA: ["<start_of_turn>", "<end_of_turn>"],
    MISTRAL: [],
    QWEN3: ["<|im_start|>", "<|im_end|>"],
    DEEPSEEK: ["<|User|>", "<|Assistant|>"],
    PHI35: ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    GPT_OSS: ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
    MARKED: ["<|im_start|>", "<|im_end|>"],
    PLAIN: [],
}


def chat_tokenizer(template: str, **options):
    """A tiny tokenizer with a chat template of this module and the special tokens that it writes."""
    tokenizer = tiny_tokenizer(**options)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[template]})
    if template in (LLAMA3, CHATML, TOOLS, QWEN3, MARKED):
        tokenizer.eos_token = SPECIALS[template][-1]
    tokenizer.chat_template = template
    return tokenizer
