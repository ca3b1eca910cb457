"""Texts and tokenizers that break what is careless."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HOSTILE = (
    "</script><script>window.hacked = 1</script>\n"
    "<img src=x onerror='window.hacked = 1'> <!-- ]]> --> {{data}} ${hacked} &lt;b&gt; \\u003c\n"
    '" onmouseover="window.hacked = 1" </style><style>*{display:none}</style>\n'
    "NUL \0 bell \a escape \x1b[31m delete \x7f next line \x85 line \u2028 paragraph \u2029\r\n"
    "override \u202eevil\u202c isolate \u2066left \u200fmark עברית العربية zero\u200bwidth \ufeff\n"
    "emoji 😀 👩‍👩‍👧 🇺🇳 astral \U0001d518 combining e\u0301\u0302\u0303\u0304\n"
    "noncharacter \uffff tag \U000e0041\n"
    "javascript:alert(1) <a href=javascript:window.hacked=1>x</a> \\ud800 %3Cscript%3E\ttab\n"
)
"""Everything that might break out of a page, or rearrange it."""


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
