#!/bin/sh
# Continues each line of standard input by `minigpt serve`, with curl 7.82 and jq: loop.sh [http://127.0.0.1:8000/v1]
address=${1:-http://127.0.0.1:8000/v1}
while printf '> ' >&2 && IFS= read -r prompt; do
    jq -n --arg prompt "$prompt" '{model: "tiny", $prompt, max_tokens: 20, temperature: 0, stream: true}' |
        curl -sSN --json @- "$address/completions" |
        jq -Rj --unbuffered 'ltrimstr("data: ") | fromjson? | .choices[0].text // .error.message // empty'
    echo
done
