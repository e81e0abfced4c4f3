"""Prompts and answers are texts or lists of chat messages; these read either."""


def messages(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def last_text(messages, role):
    """The text of a string, or of the last message of `role` in a message list."""
    if isinstance(messages, str):
        return messages
    texts = [m["content"] for m in messages if m["role"] == role]
    return texts[-1] if texts else ""


def shown_prompt(prompt):
    return repr(last_text(prompt, "user")[:60])
