import time, signal, pytest
ALL = ("node1", "node2", "node3")
@pytest.mark.parametrize("light", [True, False])
def test_p(local_job, light):
    job=local_job
    t=time.monotonic()
    def say(w):
        print(f"{time.monotonic()-t:.1f} {w}", flush=True)
    job.plan(nodes="3", restarts=1, light=light)
    job.hold(0, 3)
    job.start(*ALL)
    job.wait_reached(0, 3, *ALL); say("trains")
    job.release(0, 3)
    for n in ALL: job.launchers[n].wait_for("finished")
    say("finished")
    for n in ALL: job.launchers[n].process.wait(); say(n)
    for n in ALL: job.launchers[n].wait(); say(n)
    job.sandbox.assert_clean(); say("clean")
