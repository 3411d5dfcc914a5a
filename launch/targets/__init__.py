"""Places where a job can run, one module each; `launch.submit --to=NAME` imports `launch.targets.NAME`.

A target defines its own flags when it is imported, and has these functions:

    dry_run(submission) -> str        what it would run or apply, to the letter
    start(submission) -> int          starts the job; with --detach returns at once, else when it has ended
    status(record) -> str             what the scheduler says of the job, "" where there is none to ask
    logs(record, follow=...)          prints what its processes print
    cancel(record)                    asks it to save and end, for good

`record` is what `Submission.record` wrote into the workdir. A target whose workdirs cannot be seen from where one
submits finds it by the job's name instead:

    find(name) -> record
"""
