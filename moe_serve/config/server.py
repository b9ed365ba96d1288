"""ServerConfig: the HTTP side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_serve.config.settings import Settings, option

LOGS = "Logs, tracing and recordings"


@dataclass(frozen=True)
class ServerConfig(Settings):
    """Who may reach the server, how long connections last, and what is written down."""

    HEADING: ClassVar[str] = "HTTP"

    host: str = option("127.0.0.1", "Address to listen on. 0.0.0.0 listens on every interface.")
    port: int = option(8000, "Port to listen on; 0 picks a free one.", bound="port")
    served_model_name: str | None = option(
        None, "The model's name for clients. Default: the folder's name, or the model id of a hub cache."
    )
    dashboard: bool = option(True, "Serve the live page at /dashboard.")
    api_key: tuple[str, ...] = option(
        (),
        "Key that clients must send as `Authorization: Bearer KEY`; may be repeated. Other users of this machine can"
        " read it in the process list: --api-key-file and the variable MOE_SERVE_API_KEY are safer.",
        secret=True,
    )
    api_key_file: str | None = option(None, "File with one API key per line.", metavar="FILE")
    allowed_origins: tuple[str, ...] = option(
        (), "Web origin whose pages may call this server (CORS); may be repeated. * allows all."
    )
    allowed_hosts: tuple[str, ...] = option(
        (),
        "Host name under which a proxy or another machine reaches this server; may be repeated. Without a key, a server"
        " on loopback answers only to loopback's names and these.",
    )
    share_prefixes_between_keys: bool = option(
        False,
        "Let requests with different API keys reuse one another's cached prefixes. Saves work, but cached_tokens then"
        " tells one key's user what others have sent.",
    )
    max_body_mib: float = option(
        32.0, "Largest request body in MiB; the server refuses larger ones with 413.", bound="positive"
    )
    read_timeout_s: float = option(
        30.0,
        "Longest time in seconds for a client to send its headers, and again for its body.",
        bound="positive",
        aliases=("read_timeout",),
    )
    write_timeout_s: float = option(
        60.0,
        "Disconnect a client that reads nothing for this long, in seconds, while its answer waits.",
        bound="positive",
        aliases=("write_timeout",),
    )
    shutdown_timeout_s: float = option(
        30.0,
        "Time in seconds for running requests to finish after SIGTERM or Ctrl+C.",
        bound="not negative",
        aliases=("shutdown_timeout",),
    )
    stored_responses_mib: int = option(
        64,
        "Memory in MiB for the answers of /v1/responses, so that previous_response_id can name them; the oldest go"
        " first. 0: none are kept.",
        bound="not negative",
    )
    supervisor: bool = option(
        True,
        "Keep a small parent process that starts the server again after a signal such as SIGSEGV has ended it. Several"
        " ranks have a supervision of their own.",
    )
    tool_call_parser: str | None = option(
        None,
        "Format in which the model writes tool calls, under vLLM's name, such as hermes. Default: the tokenizer's"
        " response_template or chat template tells.",
        metavar="NAME",
    )
    reasoning_parser: str | None = option(
        None,
        "Format in which the model writes reasoning, under vLLM's name, such as deepseek_r1. Default: as for"
        " --tool-call-parser.",
        metavar="NAME",
    )
    log_format: str = option("text", "Format of log lines. json: one object per line.", ("text", "json"), heading=LOGS)
    log_requests: bool = option(
        False, "Log prompts and sampling parameters. They are never logged otherwise.", heading=LOGS
    )
    disable_log_stats: bool = option(False, "Do not log throughput every ten seconds.", heading=LOGS)
    uvicorn_log_level: str = option(
        "info", "Log level of the HTTP server.", ("critical", "error", "warning", "info", "debug"), heading=LOGS
    )
    otlp_traces_endpoint: str | None = option(
        None,
        "URL of an OpenTelemetry collector (OTLP over HTTP, such as http://localhost:4318/v1/traces); every request"
        " becomes a span there. Needs the extra moe-serve-engine[otel]. Default: no tracing.",
        metavar="URL",
        heading=LOGS,
    )
    recording_dir: str | None = option(
        None,
        "Folder for recordings of routing (POST /dump_expert_distribution_record). Default: none are made.",
        metavar="FOLDER",
        heading=LOGS,
    )
    recording_buffer_tokens: int = option(
        65536, "A recording of routing keeps this many of the newest tokens.", bound="positive", heading=LOGS
    )

    def no_effect(self) -> str | None:
        default = type(self).__dataclass_fields__["recording_buffer_tokens"].default
        if self.recording_dir is None and self.recording_buffer_tokens != default:
            return "--recording-buffer-tokens has no effect without --recording-dir"
        return None
