"""The pair of services: started together, watched, restarted after a crash, drained in order.

1. Both processes start at once.
2. `/readyz` of both is polled until both say yes; a service that ends before that ends the pair, with its exit code.
3. A service that ends later is started again, after a delay that doubles with every crash in a row. Exit code 3 says
   that it cannot serve as it is set up (`StartupError`): starting it again would not help, so the pair ends.
4. SIGINT, SIGTERM and SIGHUP drain the generator first, since its requests in flight still need the retriever.
   A second signal kills both.
"""

import asyncio
import signal
import time
from collections.abc import Sequence

import httpx

from services.client import calls
from services.client.calls import Service
from services.supervisor.child import Child, ServiceSpec
from services.supervisor.reporter import Reporter
from shared.errors import StartupError

_POLL_S = 0.2
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0
# A service that has run this long has recovered: its next crash counts as the first.
_RECOVERED_S = 60.0


def restart_delay_s(crashes: int) -> float:
    """How long to wait before the next start, after ``crashes`` >= 1 in a row."""
    return min(_FIRST_DELAY_S * 2.0 ** (crashes - 1), _LONGEST_DELAY_S)


class Pair:
    def __init__(self, specs: Sequence[ServiceSpec], reporter: Reporter) -> None:
        """``specs`` in the order in which they are stopped."""
        self._specs = specs
        self._reporter = reporter
        self.children: dict[Service, Child] = {}
        self._been_ready = False
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Serve until a signal asks to stop (0) or a service cannot be kept up (its exit code)."""
        self._listen_to_signals()
        began = time.monotonic()
        keepers = [asyncio.create_task(self._keep(spec)) for spec in self._specs]
        ready = asyncio.create_task(self._until_ready(self._specs))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([*keepers, ready, stop], return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                self._been_ready = True
                self._reporter.up({spec.name: spec.url for spec in self._specs}, time.monotonic() - began)
                await asyncio.wait([*keepers, stop], return_when=asyncio.FIRST_COMPLETED)
            return next((keeper.result() for keeper in keepers if keeper.done()), 0)
        finally:
            tasks = [*keepers, ready, stop]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._reporter.waiting({})
            for spec in self._specs:
                if child := self.children.get(spec.name):
                    await child.stop(spec.stop_grace_s)

    async def _keep(self, spec: ServiceSpec) -> int:
        """Run a service again and again. Returns the exit code with which there is no use in going on."""
        crashes = 0
        while True:
            began = time.monotonic()
            child = await Child.start(spec, lambda line: self._reporter.line(spec.name, line))
            self.children[spec.name] = child
            back = asyncio.create_task(self._announce_return(spec)) if crashes else None
            try:
                code = await child.wait()
            finally:
                if back:
                    back.cancel()
            if not self._been_ready or code == StartupError.exit_code:
                self._reporter.failure(f"could not start (exit code {code}); its own words stand above", spec.name)
                return code
            crashes = 1 if time.monotonic() - began >= _RECOVERED_S else crashes + 1
            delay_s = restart_delay_s(crashes)
            self._reporter.note(f"ended with exit code {code}; it starts again in {delay_s:g} s", spec.name)
            await asyncio.sleep(delay_s)

    async def _until_ready(self, specs: Sequence[ServiceSpec]) -> None:
        """Poll `/readyz` of ``specs`` until each has said yes."""
        waiting = list(specs)
        # trust_env: a proxy of the environment is not for services on this machine.
        async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
            while waiting:
                reasons = {spec.name: await _why_not_ready(http, spec) for spec in waiting}
                waiting = [spec for spec in waiting if reasons[spec.name]]
                self._reporter.waiting({spec.name: reasons[spec.name] for spec in waiting})
                if waiting:
                    await asyncio.sleep(_POLL_S)

    async def _announce_return(self, spec: ServiceSpec) -> None:
        began = time.monotonic()
        await self._until_ready([spec])
        self._reporter.note(f"is back, ready after {time.monotonic() - began:.1f} s", spec.name)

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            self._reporter.note(f"{number.name} again: the services are killed")
            for child in self.children.values():
                child.kill()
        else:
            self._reporter.note(f"{number.name}: finishing the requests in flight, then both services stop")
            self._stop.set()


async def _why_not_ready(http: httpx.AsyncClient, spec: ServiceSpec) -> list[str]:
    """The reasons that the service gives; none where it is ready."""
    try:
        response = await http.get(f"{spec.url}/readyz")
    except httpx.TransportError:
        return ["starting"]  # it listens only once it can say more
    health = calls.read(calls.ready(spec.name), response)
    return [] if health.status == "ok" else health.reasons or ["no reason given"]
