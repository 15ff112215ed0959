"""LongBench's files in its official schema, with short made-up records."""

import json
import zipfile
from pathlib import Path

ANSWERS = {
    "passage_count": ["3"],
    "passage_retrieval_en": ["Paragraph 2"],
    "passage_retrieval_zh": ["段落2"],
    "trec": ["Reason"],
    "lsht": ["体育"],
    "lcc": ["    return width * height\n"],
    "repobench-p": ["    return width * height\n"],
}
CLASSES = {"trec": ["Reason", "Abbreviation", "Number"], "lsht": ["体育", "财经"]}
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")


def record(dataset, number=0, **changes):
    """One line of a file, as an object."""
    chinese = dataset in CHINESE
    text = "北京是中国的首都。" if chinese else "The river is wide and the town on its bank is called Harlow. "
    fields = {
        "input": "首都是哪里？" if chinese else "What is the town called?",
        "context": text * (2 + number),
        "answers": ANSWERS.get(dataset, ["北京"] if chinese else ["Harlow", "the town of Harlow"]),
        "length": 10 * (2 + number),
        "dataset": dataset,
        "language": "zh" if chinese else "en",
        "all_classes": CLASSES.get(dataset),
        "_id": f"{dataset}-{number}",
    }
    return {**fields, **changes}


def lines(records):
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)


def write(folder, *datasets, count=2, suffix=""):
    """`count` records of each data set, in a folder; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        text = lines(record(dataset, number) for number in range(count))
        (folder / f"{dataset}{suffix}.jsonl").write_text(text, encoding="utf-8")
    return folder


def pack(folder, path):
    """The JSONL files of a folder in a zip file, as the hub has them."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(Path(folder).glob("*.jsonl")):
            archive.write(file, f"data/{file.name}")
    return Path(path)
