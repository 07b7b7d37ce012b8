"""Conversations as text: ChatML and two plainer formats, the same in training and generation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """How the turns of a conversation are written.

    A turn is its role's head, its text and the end; turns are joined by the separator. A prompt
    ends after the assistant's head, where generation begins.

    Args:
        name: of the format.
        heads: what stands before the text, by role.
        end: what stands behind it.
        separator: between turns.
        special_tokens: tags in it that a tokenizer should keep whole.

    Example:
        >>> print(CHATML.prompt([{"role": "user", "content": "Hello"}]))
        <|im_start|>user
        Hello<|im_end|>
        <|im_start|>assistant
        <BLANKLINE>
    """

    name: str
    heads: Mapping[str, str]
    end: str
    separator: str
    special_tokens: tuple[str, ...] = ()

    def turn(self, message: Message) -> str:
        """Return one turn as text.

        Raises:
            ValueError: the message lacks its role or content, or the role is not known.
        """
        return self.heads[self._role(message)] + message["content"] + self.end

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return a conversation that the assistant is to continue.

        Raises:
            ValueError: as `turn`, or there are no messages.
        """
        if not messages:
            raise ValueError("messages must not be empty")
        return "".join(self.turn(m) + self.separator for m in messages) + self.heads["assistant"]

    def examples(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """Return a prompt and a completion for every turn of the assistant.

        The prompt is exactly what `prompt` gives for the turns before, the completion the text
        with its end.

        Raises:
            ValueError: as `turn`, or the assistant says nothing or speaks first.
        """
        found = []
        for place, message in enumerate(messages):
            if self._role(message) == "assistant":
                if not place:
                    raise ValueError("the first message must not be the assistant's")
                found.append((self.prompt(messages[:place]), message["content"] + self.end))
        if not found:
            raise ValueError("messages must have a turn of the assistant to learn from")
        return found

    def _role(self, message: Message) -> str:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"a message must have a role and content, got {message!r}")
        if message["role"] not in self.heads:
            known = ", ".join(self.heads)
            raise ValueError(f"role must be one of {known}, got {message['role']!r}")
        if not isinstance(message["content"], str):
            raise ValueError(f"content must be text, got {message['content']!r}")
        return message["role"]


CHATML = ChatFormat(
    "chatml",
    {role: f"<|im_start|>{role}\n" for role in ROLES},
    "<|im_end|>",
    "\n",
    ("<|im_start|>", "<|im_end|>"),
)
DIALOGUE = ChatFormat("dialogue", {role: f"{role.upper()}: " for role in ROLES}, "", "\n")
INSTRUCTION = ChatFormat(
    "instruction",
    {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"},
    "",
    "\n\n",
)
CHAT_FORMATS = {chat.name: chat for chat in (CHATML, DIALOGUE, INSTRUCTION)}
_FILE = "chat.json"


def save_chat_format(directory: str | Path, chat: ChatFormat) -> None:
    """Write the name of the format that a model was taught beside the model."""
    text = json.dumps({"format": chat.name}) + "\n"
    Path(directory, _FILE).write_text(text, encoding="utf-8")


def load_chat_format(directory: str | Path) -> ChatFormat | None:
    """Return the format that the model of a directory was taught, None if it was none.

    Raises:
        ValueError: the file that names it is damaged, or names one that is not known.
    """
    file = Path(directory, _FILE)
    if not file.is_file():
        return None
    try:
        return CHAT_FORMATS[json.loads(file.read_text(encoding="utf-8"))["format"]]
    except (ValueError, KeyError, TypeError) as error:
        known = ", ".join(CHAT_FORMATS)
        raise ValueError(f'{file} must hold {{"format": ...}}, one of {known}') from error
