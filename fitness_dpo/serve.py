"""python -m fitness_dpo.serve: the tuned model over the OpenAI API, on this machine alone unless told otherwise."""

from pathlib import Path

from fitness_dpo.address import require_free, require_installed
from fitness_dpo.bot import find, load
from fitness_dpo.cli import verb
from fitness_dpo.config import ServeConfig


def main(config: ServeConfig, _: Path) -> None:
    for package in ("fastapi", "openai", "uvicorn"):
        require_installed(package, "serve")
    require_free(config.host, config.port)
    bot = find(config)
    policy = load(bot, merged=True)
    import uvicorn

    from fitness_dpo.api import build_app

    print(f"{bot.name} as {config.name} at http://{config.host}:{config.port}/v1 until Ctrl-C", flush=True)  # noqa: T201
    uvicorn.run(build_app(policy, bot, config), host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    verb("serve", ServeConfig, main)
