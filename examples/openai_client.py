"""The openai client (pip install openai) against `minigpt serve`: python openai_client.py [http://127.0.0.1:8000/v1]."""

import sys

from openai import OpenAI

(address,) = sys.argv[1:] or ["http://127.0.0.1:8000/v1"]
client = OpenAI(base_url=address, api_key="none")  # or what the server's --api-key-file holds
for part in client.completions.create(model="tiny", prompt="The capital of France is", temperature=0, stream=True):
    print(part.choices[0].text, end="", flush=True)
print()
