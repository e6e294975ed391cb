"""Chat templates in the manner of published families: each does with Jinja what theirs do, in few words.

`TEMPLATES` has them by name. The comment above one says what is special about it.
"""

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # a default system message, and one taken off the front
    "smollm": (
        "{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}"
        "{% else %}{% set system, rest = 'You help.', messages %}{% endif %}[{{ system | trim }}]"
        "{% for message in rest %}{{ message.role | upper }}: {{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    # the date, tools in the system message, one call at a time
    "llama3": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{%- endif %}
{{- "<|system|>Today: " + (date_string | length | string) }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- "\\n" + (t | tojson(indent=4)) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|' + message['role'] + '|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ "}" }}
    {%- else %}
        {{- '<|tool|>' }}{{ message.content if message.content is mapping else message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n\\n' }}{%- endif %}
""",
    # thoughts of earlier turns are left out; a namespace; a reversed list; an option
    "qwen3": """\
{%- set ns = namespace(last=messages | length - 1, looking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" %}{%- set ns.looking = false %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>assistant\\n' + (message.content if loop.index0 > ns.last else content) }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
            {{- '<tool_call>' + call.name + ' ' + arguments }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    # roles take turns; tools stand before the last message
    "mistral": """\
{%- set loop_messages = messages[1:] if messages[0]["role"] == "system" else messages %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message["role"] in ["user", "assistant"] and message.tool_calls is undefined %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools and (message == messages[-1]) %}{{- "[TOOLS]" }}{{ tools | tojson }}{%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson %}
            {{- "[CALL]" + out[:-1] + ', "id": "' + call.id + '"}' }}{{ ", " if not loop.last else eos_token }}
        {%- endfor %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    # another name for the assistant, no system message
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start>' + role + '\n' + message['content'] | trim + '<end>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
    ),
    # a call is an assistant's message whose content is none, and its arguments are text to add
    "deepseek": """\
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{%- set ns.system = ns.system ~ message['content'] %}{%- endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' and message['content'] is none %}
        {%- for call in message['tool_calls'] %}
            {{- '<call>' + call['function']['name'] + '\\n```json\\n' + call['function']['arguments'] + '\\n```' }}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|Assistant|>' + message['content'].split('</think>') | last + eos_token }}
    {%- elif message['role'] != 'system' %}
        {{- '<|' ~ message['role'] | capitalize ~ '|>' ~ message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}
""",
    # a macro that takes text or parts, and arguments one by one
    "glm": """\
{%- macro visible(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- content }}
    {%- endif -%}
{%- endmacro -%}
{%- for m in messages %}
    {{- '<|' + m.role + '|>\\n' + visible(m.content) }}
    {%- for call in m.tool_calls or [] %}
        {{- '<call>' + call.function.name }}
        {%- for key, value in call.function.arguments.items() %}{{- '<' + key + '>' ~ value }}{%- endfor %}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
""",
    # types of parameters by a macro that calls itself
    "hermes": """\
{%- macro python_type(spec) -%}
    {%- set basic = {'string': 'str', 'integer': 'int'} -%}
    {%- if spec.type == 'array' -%}list[{{ python_type(spec['items']) }}]
    {%- elif spec.type is defined -%}{{ basic.get(spec.type, 'Any') }}{%- else -%}Any{%- endif -%}
{%- endmacro -%}
{%- for tool in tools or [] %}
    {%- set f = tool.function %}
    {{- f.name + '(' }}
    {%- for name, spec in f.parameters.properties | items %}
        {{- name + ': ' + python_type(spec) }}{{ ', ' if not loop.last }}
    {%- endfor %}
    {{- ')\\n' }}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<results>' }}{%- endif %}
        {{- message.content }}
        {%- if loop.nextitem is undefined or loop.nextitem.role != 'tool' %}{{- '</results>' }}{%- endif %}
    {%- else %}
        {{- '<' + message.role + '>' + message.content }}
        {%- for call in message.tool_calls | default([], true) %}{{- call | tojson }}{%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}
""",
    # looks for the key itself
    "harmony": """\
{%- for message in messages -%}
    {%- if message.role == 'assistant' and 'tool_calls' in message -%}
        {%- if 'content' in message and message.content -%}
            {{- '<analysis>' + message.content }}
        {%- endif -%}
        {{- '<to=' + message.tool_calls[0].function.name + '>' }}{{ message.tool_calls[0].function.arguments | tojson }}
    {%- else -%}
        {{- '<' + message.role + '>' + message.content + '<end>' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
""",
    # parts of the user; the system's are text
    "vision": """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<s>' + system }}
{%- for message in messages %}
    {{- '<' + message.role + '>' }}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' %}{{- '<|image|>' }}{%- endif %}
            {%- if content.type == 'text' %}{{- content.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}
""",
    # filters over tools and messages
    "granite": """\
{%- if tools %}{{- tools | map(attribute='function') | map(attribute='name') | join(', ') }}{%- endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- '(' ~ users | length ~ ' of ' ~ messages | count ~ ')' }}
{%- for message in messages | rejectattr('role', 'equalto', 'tool') %}
    {{- '<' ~ message.role ~ '>' ~ message.content ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}
""",
    # what training masks
    "smol3": (
        "{% for message in messages %}{% if message.role == 'assistant' %}<a>{% generation %}{{ message.content }}</a>"
        "{% endgeneration %}{% else %}<u>{{ message.content }}</u>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    ),
    # loops that stop early, and blocks as values
    "phi": (
        "{% set opening %}{% for message in messages %}{% if message.role != 'system' %}{% continue %}{% endif %}"
        "{{ message.content }}{% break %}{% endfor %}{% endset %}{{ opening | trim or 'none' }}"
        "{% for message in messages if message.role != 'system' %}{{ '<|' + message.role + '|>' + message.content }}"
        "{% else %}nobody{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    # indexes, and whether a turn is the first or the last
    "llama2": (
        "{% for message in messages %}{% if loop.index0 % 2 == 0 %}"
        "{{ bos_token + '[INST] ' if loop.first else '[INST] ' }}{{ message['content'].strip() }} [/INST]"
        "{% else %} {{ message['content'] | trim }}{{ '' if loop.last else eos_token }}{% endif %}{% endfor %}"
    ),
}
