"""What `cmath.yaml` calls: worked examples, and the comparison of a number in a text with the right one."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

# 1,234.5 or 3/4, perhaps with a sign or a percent sign.
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
ANSWER = re.compile(rf"答案是[：:\s$]*({NUMBER.pattern})")


def fewshot_samples() -> list[dict[str, str]]:
    """Four problems of our own, of rising difficulty, with their working."""
    return [
        {
            "question": "书架上有15本书，小明借走了6本，又还回来2本，现在书架上有多少本书？",
            "solution": "借走以后有15-6=9本，还回来2本以后有9+2=11本。答案是11。",
        },
        {
            "question": "一盒铅笔有12支，老师买了8盒，平均分给4个小组，每个小组分到多少支？",
            "solution": "一共有12×8=96支，每个小组分到96÷4=24支。答案是24。",
        },
        {
            "question": "一根绳子长7.2米，用去它的四分之一，还剩多少米？",
            "solution": "用去7.2÷4=1.8米，还剩7.2-1.8=5.4米。答案是5.4。",
        },
        {
            "question": "一条路已经修了全长的3/8，还剩150米没有修，这条路全长多少米？",
            "solution": "还剩全长的1-3/8=5/8，所以全长是150÷(5/8)=240米。答案是240。",
        },
    ]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """1 if the number behind the last "答案是", or else the last number, equals `golden`."""
    found = ANSWER.findall(results[0]) or NUMBER.findall(results[0])
    return {"exact_match": int(bool(found) and number(found[-1]) == number(str(doc["golden"])))}


def number(text: str) -> Fraction | None:
    """The value of `text`, as "1,200", "3/4", "0.50" or "25%"; `None` if it is no number."""
    plain = text.strip().replace(",", "")
    try:
        return Fraction(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except (ValueError, ZeroDivisionError):
        return None
