"""The OpenAI chat API over one policy: transformers' own serving code, fed with the prompts that the bot was trained on.

`transformers serve` itself renders a conversation first and tokenizes it then, so that `<|im_end|>` in a question ends the
question. Here ChatTemplate makes the token ids, and what a client writes stays text.
"""

from dataclasses import replace
from typing import Any

import msgspec
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerateManager, Modality, set_torch_seed

from fitness_dpo.bot import Bot
from fitness_dpo.config import InputError, SamplingConfig, ServeConfig
from fitness_dpo.conversation import fit
from fitness_dpo.data import Message
from fitness_dpo.inference import ask, generation_config
from fitness_dpo.model import Policy
from fitness_dpo.template import ChatTemplate

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def build_app(policy: Policy, bot: Bot, config: ServeConfig) -> FastAPI:
    """The server: POST /v1/chat/completions, GET /v1/models and GET /health. Requests wait for one another."""
    app = FastAPI(title="fitness_dpo", docs_url=None, redoc_url=None, openapi_url=None)
    handler = ChatHandler(policy, bot, config)

    @app.exception_handler(InputError)
    async def refuse(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    @app.post("/v1/chat/completions")
    async def complete(request: Request, body: dict[str, Any]) -> Response:
        response: Response = await handler.handle_request(body, f"chatcmpl-{id(request):x}")
        return response

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": config.name, "object": "model", "created": 0, "owned_by": "fitness_dpo"}],
        }

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


class ChatHandler(ChatCompletionHandler):
    """transformers' handler with this project's prompts, one model and its sampling."""

    def __init__(self, policy: Policy, bot: Bot, config: ServeConfig) -> None:
        self.policy, self.bot, self.config = policy, bot, config
        self.template = ChatTemplate(policy.tokenizer)
        self.manager = GenerateManager()

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        self._validate_request(body)
        name = body.get("model")
        if name != self.config.name:
            raise InputError(f"model={name}: this server has model={self.config.name} alone; ask for that")
        sampling = requested_sampling(body, self.config.sampling)
        ids = self.template.prompt_ids(self.prompt(body.get("messages"), sampling))
        input_ids = torch.tensor([ids], device=self.policy.model.device)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        drawn: GenerationConfig = generation_config(self.policy, sampling)
        if body.get("stop") is not None:
            drawn.stop_strings = body["stop"]
        self.manager.submit(set_torch_seed, sampling.seed)  # in the thread that draws, just before this answer
        arguments = (request_id, self.policy.model, self.policy.tokenizer, self.config.name, inputs, drawn)
        if body.get("stream"):
            return self._streaming(*arguments, gen_manager=self.manager)
        return await self._non_streaming(*arguments, gen_manager=self.manager)

    def prompt(self, sent: Any, sampling: SamplingConfig) -> list[Message]:
        """The conversation a request brings, behind the run's system prompt where it brings none, cleaned as in training."""
        if not isinstance(sent, list) or not sent or not all(isinstance(message, dict) for message in sent):
            raise InputError("messages: send at least one message")
        roles = [message.get("role") for message in sent]
        if not all(role in tuple(ROLES) for role in roles) or roles[-1] != "user":
            raise InputError(f"messages: roles {roles}; send {', '.join(ROLES)}, a user's message last")
        texts = self.get_processor_inputs_from_messages(sent, Modality.LLM)
        *before, question = [{"role": ROLES[text["role"]], "content": str(text["content"])} for text in texts]
        has_system = bool(before) and before[0]["role"] == "system"
        system = before.pop(0)["content"] if has_system else self.bot.system_prompt
        asked = ask(question["content"], system, tuple(before), standardised=self.bot.standardised)
        messages, forgotten = fit(self.policy, asked, self.bot.model.max_length_tokens, sampling.max_new_tokens)
        if forgotten:
            raise InputError(
                f"messages: too long for model.max_length_tokens={self.bot.model.max_length_tokens} and an answer of "
                f"{sampling.max_new_tokens} tokens; leave out the oldest {forgotten} questions"
            )
        return messages


class Asked(msgspec.Struct):
    """What a request may say about how its answer is drawn."""

    temperature: int | float | None = None
    top_p: int | float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


def requested_sampling(body: dict[str, Any], sampling: SamplingConfig) -> SamplingConfig:
    """`sampling` with what a request says about temperature, top_p, seed and length. Temperature 0 is greedy."""
    try:
        asked = msgspec.convert(body, Asked)
    except msgspec.ValidationError as error:
        raise InputError(f"request: {error}") from error
    longest = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    given: dict[str, Any] = {
        "top_p": asked.top_p,
        "seed": asked.seed,
        "max_new_tokens": longest,
        "temperature": asked.temperature or None,
    }
    if asked.temperature is not None:
        given["do_sample"] = asked.temperature > 0
    return replace(sampling, **{key: value for key, value in given.items() if value is not None})
