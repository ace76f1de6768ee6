from .first_seconds import answer_interrupts

answer_interrupts()
