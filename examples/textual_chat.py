"""A chat in the terminal: answers come word by word, Escape stops one, the arrow keys bring earlier questions back.

pip install '.[cpu,export,huggingface,chat]' textual
pastkey export HuggingFaceTB/SmolLM2-135M-Instruct --out bundle
python examples/textual_chat.py bundle
"""

import sys
from itertools import takewhile
from typing import ClassVar

from textual import work, worker
from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Footer, Input, Static

import pastkey
from pastkey.errors import PastkeyError
from pastkey.runtime import Chat


class ChatWindow(App[None]):
    CSS = "Static { margin: 0 2 1 2; } .question { color: $accent; text-style: bold; }"
    BINDINGS: ClassVar = [("escape", "stop", "Stop"), ("up", "recall(-1)", "Earlier"), ("down", "recall(1)", "Later")]

    def __init__(self, chat: Chat) -> None:
        super().__init__()
        self.chat, self.asked, self.place, self.said = chat, list[str](), 0, VerticalScroll(can_focus=False)

    def compose(self) -> ComposeResult:
        yield from (self.said, Input(placeholder="Ask something"), Footer())

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.value.strip() and not self.workers:  # while an answer comes, a question waits in its line
            self.asked.append(event.value)
            self.place, answer = len(self.asked), Static(markup=False)
            event.input.clear()
            self.said.mount(Static(event.value, classes="question", markup=False), answer)
            self.said.anchor()  # the end stays in sight
            self.answer(event.value, answer)

    @work(thread=True)
    def answer(self, question: str, shown: Static) -> None:
        me = worker.get_current_worker()
        try:  # a chat that is left in the middle keeps what came until then
            for chunk in takewhile(lambda _: not me.is_cancelled, self.chat.stream(question)):
                self.call_from_thread(shown.update, f"{shown.content}{chunk.text}")
        except PastkeyError as error:  # the conversation is as it was
            self.call_from_thread(shown.update, str(error))

    def action_stop(self) -> None:
        self.workers.cancel_all()

    def action_recall(self, step: int) -> None:
        self.place = max(0, min(len(self.asked), self.place + step))
        self.query_one(Input).value = [*self.asked, ""][self.place]


if __name__ == "__main__":
    ChatWindow(pastkey.load(sys.argv[1]).chat()).run()
