"""Talk to a running server with the official `openai` package.

make serve                                       # in one terminal
.venv/bin/python examples/openai_client.py       # in another
"""

from openai import OpenAI


def main() -> None:
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=40,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    completion = client.completions.create(model=model, prompt="It was a cold morning and", max_tokens=30, seed=1)
    print(completion.choices[0].text)


if __name__ == "__main__":
    main()
