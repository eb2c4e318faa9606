"""Detects words around a letter or an option that negate or doubt it, in English and partly other languages."""

import re


_CLAUSE = re.compile(
    r"[,;]|\b(?:(?<!anything )(?<!nothing )(?<!all )but|so|therefore|hence|thus|then)\b", re.IGNORECASE
)
_NEGATION = re.compile(
    r"\b(?:not|no(?!\s+(?:doubt|question))|never|nor|neither|none|nobody|nothing|cannot|hardly|reject\w*|refuse\w*"
    r"|avoid\w*|(?<!no )(?<!without )(?<!without a )doubt|deny|eliminat\w*|rul(?:e|es|ed|ing)\s+out|exclud\w*"
    r"|discard\w*|dismiss\w*|except|wrong|incorrect|false|mistake\w*|untrue|impossible|anything\s+but|rather\s+than"
    r"|retract\w*|withdraw\w*|take\s+back|instead\s+of|other\s+than|unlikely|least|worst|nicht|kein\w*|pas|não|nao|non|niet|geen|inte|nie|не|нет|değil"
    r"|bukan|tidak|không)\b|n't\b|不(?![过過难難仅僅])|非(?!常)|[无無](?![疑论論])|[没沒未勿]|[别別][选選]|排除|[错錯]"
    r"|아니|아닙|않|ではな|ではあり|じゃな",
    re.IGNORECASE,
)
_DOUBT = re.compile(
    r"\b(?:maybe|perhaps|possibly|might|may|could|can\s+be|either|both|whether|between|unsure|uncertain|unclear|was|were"
    r"|if|suppose|assum\w*|unless|why|(?:some|many)\s+(?:say|claim|think|people|students)|says|said|claims|claimed|thinks"
    r"|believes|suggests|wenn|falls)\b|[若吗嗎]|如果|假设|可能|[或也]许|大概",
    re.IGNORECASE,
)
_VERDICT = (
    r"wrong|incorrect|impossible|eliminat\w+|exclud\w+|discard\w+|reject\w+|dismiss\w+|ruled?\s+out|distractor"
    r"|contradict(?:s|ed|ing|ory)|violat\w+|conflict(?:s|ed|ing)|inconsistent|incompatible|unsupported|untrue"
    r"|mis(?:read|interpret|quot|stat|represent)\w*|(?:over|under)states|exaggerates|confuses|omits|ignores|lacks|fails"
    r"|goes\s+(?:too|against|beyond)|makes\s+no|has\s+no|mentions\s+no\w*|uses\s+the\s+wrong|adds\s+a|assumes\s+(?:too|that)"
    r"|reverses\s+the|equals|applies\s+to\s+(?:an)?other"
)
_CONDEMNED = re.compile(
    rf"\W*(?i:{_VERDICT})\b|\W*[✗✘❌❎×]"
    r"|\W*(?i:no|out|contradiction|not\s+(?:right|correct|true|it|so|possible|valid|supported))\W*\Z"
    rf"|(?!\W*(?:because|since|as)\b)(?:.*\W)?(?:is|was|be|being|are|been)\s+(?i:false|{_VERDICT})\W*\Z"
)


def clause_before(text: str) -> str:
    """The end of a text, after its last comma or conjunction. Negations before it belong to another clause."""
    return text[max((match.end() for match in _CLAUSE.finditer(text)), default=0) :]


def is_negated(clause: str) -> bool:
    """Whether a clause has a negation: `I would not pick`, `the wrong answer is`, `不选`."""
    return _NEGATION.search(clause) is not None


def is_doubted(clause: str) -> bool:
    """Whether a clause has a doubt: `maybe`, `if the answer is`, `it could be`."""
    return _DOUBT.search(clause) is not None


def is_condemned(text: str) -> bool:
    """Whether the words behind a letter judge it: `contradicts the text`, `, in short, is wrong`."""
    return _CONDEMNED.match(text) is not None
