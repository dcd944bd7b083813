"""Writes chat/cases.json: chat templates of published models, and small ones for single features, as transformers renders them."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import jinja2
from common import save_json
from transformers.utils.chat_template_utils import render_jinja_template

# Template file: beginning-of-sequence and end-of-sequence token; None is a token the tokenizer does not have.
MODELS = {
    "smollm2": ("<|im_start|>", "<|im_end|>"),
    "chatml": ("<s>", "<|im_end|>"),
    "llama-3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llama-3.1": ("<|begin_of_text|>", "<|eot_id|>"),
    "mistral-7b-v0.2": ("<s>", "</s>"),
    "mistral-7b-v0.3": ("<s>", "</s>"),
    "mistral-nemo": ("<s>", "</s>"),
    "gemma-2": ("<bos>", "<eos>"),
    "gemma-3": ("<bos>", "<eos>"),
    "qwen2.5": (None, "<|im_end|>"),
    "qwen3": (None, "<|im_end|>"),
    "phi-3": ("<s>", "<|endoftext|>"),
    "phi-3.5": ("<s>", "<|endoftext|>"),
    "zephyr": ("<s>", "</s>"),
    "deepseek-v2": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek-r1-distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "glm-4.5": (None, "<|endoftext|>"),
    "llama-3-training": ("<|begin_of_text|>", "<|eot_id|>"),
    "phi-3-training": ("<s>", "<|endoftext|>"),
    "qwen2.5-training": (None, "<|im_end|>"),
}


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


ODD_TEXT = (
    "Grüße, 你好, مرحبا, 🦊 & e\u0301 <b>bold</b> &amp; \"double\" 'single' \\n {{ x }} {% if %} {# no #} $1 %s\u00a0end"
)
# Name: messages, whether a generation prompt is added.
CONVERSATIONS = {
    "system": (
        turns(
            ("system", "Answer in one word."),
            ("user", "What is the capital of France?"),
            ("assistant", "Paris"),
            ("user", "And of Italy?"),
        ),
        True,
    ),
    "no_system": (turns(("user", "Name a color."), ("assistant", "Blue."), ("user", "Another?")), True),
    "odd_text": (turns(("user", ODD_TEXT), ("assistant", ODD_TEXT)), False),
    "spaces": (
        turns(
            ("system", "  two spaces\n"),
            ("user", "\n\tone\r\n\n"),
            ("assistant", " \n<think>\nwhy\n</think>\n\n a  b \n"),
            ("user", ""),
            ("assistant", "last\n"),
        ),
        False,
    ),
    "two_users": (turns(("user", "One"), ("user", "Two")), True),
}

CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather in a "city" <now>.',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["city"],
            },
        },
    }
]
TOOL_MESSAGES = [
    {"role": "user", "content": "Weather in Zürich?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": '{"sky": "<clear>", "°C": 21.5}'},
]
THINKING = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "reasoning_content": "Add them.", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>\nAdd again.\n</think>\n\n6"},
]
PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two."}]},
]

# Name: template, messages. Each shows one feature, so that a failure names it.
PAIR = turns(("user", " Hi <there> & 'you' "), ("assistant", "Hello\nworld"))
DATA = [
    {
        "role": "user",
        "content": "ünï <b>&'\"\\ \n\t\u2028 🦊",
        "data": {"z": 1, "a": [1.5, -2, 12345678901234567890, True, None, []], "e": {}, "n": {"k": "v"}},
    }
]
SMALL = {
    "tojson": ("{{ messages | tojson }}", DATA),
    "tojson_indent": ("{{ messages[0].data | tojson(indent=2) }}|{{ messages[0] | tojson(indent=4) }}", DATA),
    "tojson_separators": ("{{ messages | tojson(separators=(',', ':')) }}", DATA),
    "tojson_sort_keys": ("{{ messages[0].data | tojson(sort_keys=true) }}", DATA),
    "tojson_ensure_ascii": ("{{ messages[0].content | tojson(ensure_ascii=true) }}", DATA),
    "tojson_floats": ("{{ [1.0, 0.1, -0.0, 123456789.125, 1e-7, 1e16, 1e22] | tojson }}", PAIR),
    "tojson_scalars": ("{{ 'a' | tojson }}{{ 1 | tojson }}{{ 1.5 | tojson }}{{ true | tojson }}{{ none | tojson }}", PAIR),
    "strftime_now": ("{% if strftime_now is defined %}{{ strftime_now('x') }}{{ strftime_now('%%') }}{% endif %}", PAIR),
    "loop_controls": (
        "{% for n in range(9) %}{% if n == 2 %}{% continue %}{% endif %}{% if n == 5 %}{% break %}{% endif %}{{ n }},{% endfor %}",
        PAIR,
    ),
    "loop_variables": (
        "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.length }}"
        "{{ 'F' if loop.first }}{{ 'L' if loop.last }}{{ loop.previtem.role if loop.previtem is defined }}"
        "{{ loop.nextitem.role if loop.nextitem is defined }};{% else %}none{% endfor %}"
        "{% for m in messages if m.role == 'tool' %}x{% else %}no tool{% endfor %}",
        PAIR,
    ),
    "generation": (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\n"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{%- if add_generation_prompt -%}<assistant>{%- endif -%}",
        turns(("user", "é🦊"), ("assistant", "Ünï"), ("user", "more"), ("assistant", "🦊 done")),
    ),
    "namespace": (
        "{% set ns = namespace(n=0, last='') %}{% set lost = 0 %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% set lost = lost + 1 %}{% set ns.last = m.role %}{% endfor %}{{ ns.n }}{{ ns.last }}{{ lost }}",
        PAIR,
    ),
    "strip": (
        "[{{ messages[0].content.strip() }}][{{ 'xxaxx'.strip('x') }}][{{ 'xa '.lstrip('x') }}][{{ ' ab'.rstrip('b') }}]"
        "[{{ '\n\ta\u00a0'.strip() }}][{{ messages[0]['content'] | trim }}]",
        PAIR,
    ),
    "split": (
        "{{ 'a</think>b</think>c'.split('</think>')[-1] }}|{{ 'a b  c '.split() | join('-') }}|{{ 'a b  c '.split(' ') | length }}"
        "|{{ 'a,b,c'.split(',', 1) | join(';') }}|{{ 'a,b,c'.rsplit(',', 1)[0] }}|{{ messages[1].content.splitlines() | length }}",
        PAIR,
    ),
    "startswith": (
        "{{ 'y' if 'abc'.startswith('ab') and 'abc'.endswith('bc') and not 'abc'.startswith('b') else 'n' }}"
        "{% if messages[0].content.startswith(' Hi') %}y{% endif %}{{ 'y' if 'b' in 'abc' }}{{ 'y' if 'z' not in 'abc' }}"
        "{{ 'y' if 'role' in messages[0] }}{{ 'y' if 'a' in ['a'] }}",
        PAIR,
    ),
    "string_methods": (
        "{{ 'aBc'.upper() }}{{ 'aBc'.lower() }}{{ 'two words'.title() }}{{ 'aBc'.capitalize() }}{{ 'aXbX'.replace('X', '-') }}"
        "{{ 'a-b'.replace('-', '', 1) }}{{ 'abcb'.find('b') }}{{ 'abcb'.count('b') }}{{ ','.join(['a', 'b']) }}{{ 'ab' * 2 }}",
        PAIR,
    ),
    "items": (
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in {'b': 1, 'a': 2} | items %}{{ k }}{{ v }}{% endfor %}"
        "{% for k in messages[0].keys() %}{{ k }}{% endfor %}{{ {'a': 1}.values() | list | length }}"
        "{{ messages[0].get('role') }}{{ messages[0].get('name', 'none') }}{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{% endfor %}",
        PAIR,
    ),
    "slices": (
        "{% for m in messages[::-1] %}{{ m.role }},{% endfor %}{{ messages[1:] | length }}{{ messages[:-1] | length }}"
        "{{ 'hello'[1:3] }}{{ 'hello'[::-1] }}{{ 'hello'[-2:] }}{{ 'hello'[:-1] }}{{ messages[-1]['role'] }}{{ [1, 2, 3, 4][::2] | join }}",
        PAIR,
    ),
    "filters": (
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | map(attribute='role') | join('/') }}"
        "{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | first }}{{ missing | default('d') }}"
        "{{ '' | default('e', true) }}{{ [3, 1, 2] | sort | join }}{{ [1, 2] | last }}{{ 'abc' | upper | length }}{{ 'x' | string }}"
        "{{ '7' | int + 1 }}{{ ['a', 'a', 'b'] | unique | join }}{{ [1, 2, 3] | sum }}{{ ['b', 'a'] | reverse | join }}",
        PAIR,
    ),
    "tests": (
        "".join(
            "{{ 'y' if " + test + " else 'n' }}"
            for test in [
                "'a' is string", "{} is mapping", "[] is iterable", "[] is sequence", "'a' is mapping", "none is none",
                "missing is defined", "missing is undefined", "tools is defined", "tools is none", "documents is none",
                "1 is number", "1 is integer", "1 is float", "true is true", "false is false", "1 is true",
                "true is boolean", "messages[0].tool_calls is defined", "2 is odd", "'a' is not none", "2 is divisibleby 2",
                "'' is string", "messages is mapping", "'a' is iterable", "bos_token is defined",
            ]
        ),
        PAIR,
    ),
    "literals": ("{{ true }} {{ false }} {{ none }} {{ True }} {{ None }} {{ 1.0 }} {{ 10 // 3 }} {{ 10 / 4 }} {{ 7 % 3 }} {{ 2 ** 3 }}", PAIR),
    "lists": ("{{ ['a', 1, none, true] }} {{ {'k': 'v', 'n': [1.5]} }} {{ ('a', 'b') }} {{ ['it\\'s', \"q\\\"\"] }}", PAIR),
    "undefined": ("[{{ missing }}][{{ messages[0].missing }}][{% if missing %}x{% endif %}][{{ 'a' if missing else 'b' }}][{{ 'a' if missing }}]", PAIR),
    "operators": ("{{ 'a' ~ 1 ~ 'b' }}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 'y' if 1 < 2 <= 2 }}{{ 'y' if not 0 }}{{ 'x' or 'y' }}{{ '' or 'y' }}{{ 1 and 2 }}", PAIR),
    "macro": (
        "{% macro say(m, end='!') %}{{ m.role }}:{{ m.content | trim }}{{ end }}{% endmacro %}"
        "{{ say(messages[0]) }}{{ say(messages[1], end='?') }}",
        PAIR,
    ),
    "set_block": ("{% set text %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}[{{ text | trim }}]", PAIR),
    "unpacking": ("{% set a, b = 1, 2 %}{{ a }}{{ b }}{% for x, y in [(1, 2), (3, 4)] %}{{ x + y }}{% endfor %}{{ dict(a=1).a }}", PAIR),
    "whitespace_control": (
        "  {% if true %}\n    kept\n  {% endif %}\n\n{%- for m in messages -%}\n  {{ m.role }}\n{%- endfor %}\n{# gone #}\nend\n\n",
        PAIR,
    ),
    "raw": ("{% raw %}{{ not rendered }}{% endraw %}{# a comment #}{{ '{{' }}", PAIR),
    "raise_exception": ("a{{ raise_exception('No <tools> here: ' ~ messages[0].role) }}", PAIR),
    "no_escape": ("{% for m in messages %}{{ m.content }}{% endfor %}{{ '<&>\"' }}", PAIR),
}


def render(template, messages, prompt, bos, eos, tools, variables):
    """What transformers renders, with the spans of its generation blocks in characters, or the template's own error."""
    tokens = {k: v for k, v in {"bos_token": bos, "eos_token": eos}.items() if v is not None}
    try:
        rendered, spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask="endgeneration" in template,
            **tokens,
            **variables,
        )
    except jinja2.exceptions.TemplateError as error:
        assert type(error) is jinja2.exceptions.TemplateError, error  # raise_exception's own class, no other
        return {"error": str(error)}
    result = {"expected": rendered[0]}
    if spans:
        result["generation_spans"] = [list(span) for span in spans[0]]
    return result


cases = []


def add(name, template, messages, prompt=False, bos=None, eos=None, tools=None, variables=None):
    case = dict(name=name, template=template, bos_token=bos, eos_token=eos, messages=messages, add_generation_prompt=prompt)
    if tools:
        case["tools"] = tools
    if variables:
        case["variables"] = variables
    cases.append(case | render(template, messages, prompt, bos, eos, tools, variables or {}))


templates = {name: (HERE / "templates" / f"{name}.jinja").read_bytes().decode() for name in MODELS}
for name, (bos, eos) in MODELS.items():
    for conversation, (messages, prompt) in CONVERSATIONS.items():
        add(f"{name}/{conversation}", templates[name], messages, prompt, bos, eos)
for name in ["llama-3.1", "mistral-7b-v0.3", "mistral-nemo", "qwen2.5", "qwen3", "qwen2.5-training"]:
    add(f"{name}/tools", templates[name], TOOL_MESSAGES, True, *MODELS[name], tools=TOOLS)
for name in ["qwen3", "glm-4.5"]:
    add(f"{name}/thinking", templates[name], THINKING, False, *MODELS[name])
    add(f"{name}/no_thinking", templates[name], THINKING[:1], True, *MODELS[name], variables={"enable_thinking": False})
for name in ["gemma-3", "mistral-7b-v0.3", "glm-4.5"]:
    add(f"{name}/parts", templates[name], PARTS, True, *MODELS[name])
add("mistral-nemo/call_id", templates["mistral-nemo"], TOOL_MESSAGES[:1] + [{**TOOL_MESSAGES[1], "tool_calls": [{**CALL, "id": "1"}]}])
for name, (template, messages) in SMALL.items():
    add(f"small/{name}", template, messages)
add("small/generation_prompt", SMALL["generation"][0], SMALL["generation"][1][:1], True)

assert len({case["name"] for case in cases}) == len(cases)
save_json(HERE / "cases.json", cases)
print(len(cases), "cases,", sum("error" in case for case in cases), "errors")
