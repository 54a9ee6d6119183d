"""What a refused call says."""

from collections.abc import Callable
from typing import Any

import pytest


def refusal(kind: type[Exception], call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The message of the error that the call raises, which is one line."""
    with pytest.raises(kind) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message
