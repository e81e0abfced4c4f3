"""The built-in tasks, the loaders, and the error that tells a user what to fix.

    from data import load_records
    load_records("tasks", "train", n=2, level="chat")   # or "hh-helpful", "hh-harmless", "FILE.jsonl"

One record: {"prompt": "Write one short sentence about bees. Use only lowercase letters.",
             "chosen": "bees turn nectar into honey.", "rejected": "Bees turn nectar into honey.", ...columns}
"""

from data.chat_tasks import chat_tasks
from data.errors import UserError
from data.loaders import load_records
from data.tiny_tasks import tiny_tasks

__all__ = ["UserError", "chat_tasks", "load_records", "tiny_tasks"]
