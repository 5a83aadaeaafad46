"""From what the captioner says to what a training set says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """trigger: the words that stand for what is taught; prefix: put before; strip: beginnings taken off."""

    trigger: str = ""
    prefix: str = ""
    strip: tuple[str, ...] = ()

    def __call__(self, answer: str) -> str:
        """`trigger, prefix answer` in one line, the answer without the beginnings, whatever their case."""
        answer = " ".join(answer.split())
        for beginning in self.strip:
            if answer.lower().startswith(beginning.lower()):
                answer = answer[len(beginning) :].lstrip()
        caption = " ".join(part for part in (self.prefix.strip(), answer) if part)
        return ", ".join(part for part in (self.trigger.strip(), caption) if part)
