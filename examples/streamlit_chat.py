"""A chat with the service's agent in Streamlit, with plain httpx and `Decoder`.

    make run
    streamlit run examples/streamlit_chat.py

It shows the agent's steps as they happen, the answer word by word, and the sources under it. SSEAPP_URL chooses another
server, SSEAPP_TOKEN is the token. (`ssecore.client` would also resume after a cut, but it is asynchronous and
Streamlit isn't.)
"""

import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import streamlit as st

from sseapp import Decoder

URL = os.environ.get("SSEAPP_URL", "http://127.0.0.1:8000")
TOKEN = os.environ.get("SSEAPP_TOKEN")
HEADERS = {"authorization": f"Bearer {TOKEN}"} if TOKEN else {}
#: Longer than any silence of the service, which sends a heartbeat each 15 s.
TIMEOUT = httpx.Timeout(60)


def ask(message: str, session: str) -> Iterator[dict[str, Any]]:
    body = {"message": message, "session_id": session}
    with httpx.stream("POST", f"{URL}/api/chat", json=body, headers=HEADERS, timeout=TIMEOUT) as response:
        if response.status_code != 200:
            problem = json.loads(response.read())
            yield {"type": "error", "message": problem.get("detail", response.reason_phrase)}
            return
        decoder = Decoder()
        for chunk in response.iter_bytes():
            for event in decoder.feed(chunk):
                if event.data == "[DONE]":
                    return
                yield json.loads(event.data)
    yield {"type": "error", "message": "the stream broke off"}


def show(message: str) -> dict[str, Any]:
    """Shows the answer as it arrives. Returns the entry for the history."""
    answer, sources, failure = "", [], None
    status, text = st.status("…"), st.empty()
    try:
        for event in ask(message, st.session_state.session):
            if event["type"] == "status":
                status.update(label=event["status"])
            elif event["type"] == "chunk":
                answer += event["content"]
                text.markdown(answer)
            elif event["type"] == "result":
                answer, sources = event["content"], event["sources"]
                text.markdown(answer)
            elif event["type"] == "error":
                failure = event["message"]
    except httpx.TransportError as error:
        failure = f"{URL} can't be reached: {error}"
    status.update(label="failed" if failure else "done", state="error" if failure else "complete")
    if failure:
        st.error(failure)
    return {"role": "assistant", "content": answer, "sources": sources}


def tell(entry: dict[str, Any]) -> None:
    for source in entry.get("sources", []):
        st.caption(json.dumps(source))


st.title("Ask the agent")
if "session" not in st.session_state:
    st.session_state.session, st.session_state.messages = uuid.uuid4().hex, []
for entry in st.session_state.messages:
    with st.chat_message(entry["role"]):
        st.markdown(entry["content"])
        tell(entry)
if question := st.chat_input("How many tasks are overdue?"):
    st.session_state.messages.append({"role": "user", "content": question})
    with st.chat_message("user"):
        st.markdown(question)
    with st.chat_message("assistant"):
        entry = show(question)
        tell(entry)
    st.session_state.messages.append(entry)
