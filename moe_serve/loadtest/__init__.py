"""The load generator behind `moe-serve bench serve`: measures any OpenAI-compatible server, as `vllm bench serve` does.

    flags.py            the flags, and what they mean together
    datasets.py         which requests: random, shared prefixes, ShareGPT, custom files, recorded arrival traces
    arrival_traces.py   files of recorded arrivals (Azure, Mooncake)
    vocabulary.py       prompts of a planned length, spelt in the server's own tokens
    client.py           sends them, and notes when every token comes back
    openai_stream.py    reads streamed answers
    api_key.py          the key to send
    measure.py          one run, from settings to figures, and when its requests come; start here
    summary.py          from times to figures

Knows HTTP and the OpenAI API; knows nothing of our server's code, and prints nothing.
"""
