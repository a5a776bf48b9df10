"""python -m fitness_dpo.chat: a web page to talk with the tuned model, on this machine alone unless told otherwise."""

from pathlib import Path

from fitness_dpo.address import require_free, require_installed
from fitness_dpo.bot import find, load
from fitness_dpo.cli import verb
from fitness_dpo.config import ChatConfig


def main(config: ChatConfig, _: Path) -> None:
    require_installed("gradio", "chat")
    require_free(config.host, config.port)
    bot = find(config)
    policy = load(bot, merged=False)
    from fitness_dpo.page import launch

    print(f"{bot.name} answers at http://{config.host}:{config.port} until Ctrl-C", flush=True)  # noqa: T201
    launch(policy, bot, config)


if __name__ == "__main__":
    verb("chat", ChatConfig, main)
