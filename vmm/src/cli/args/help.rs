//! What `--help` says below the options: worked examples, and what exit codes mean.

pub(super) const ABOUT: &str = "Boots a kernel that owns its whole memory-management stack, pauses it, looks inside, and judges";

pub(super) const EXIT_CODES: &str = "\
Exit codes:
  0  all invariants held          3  this host cannot (says what is missing, and how to get it)
  1  a violation was found        4  the guest crashed, hung or did not finish
  2  bad input or usage           5  internal error";

pub(super) const EXAMPLES: &str = "\
Examples:
  stalemate doctor                               can this host run anything, and what can it show?
  stalemate list scenarios                       the questions that are ready to be asked
  stalemate run smoke                            boot, run, check, verdict
  stalemate run unmap-race --vcpus 4 --runs 20   twenty times, until one is not clean
  stalemate explore litmus-cow                   many interleavings, every step judged; no KVM
  stalemate inspect smoke --at pte-install:3     pause in the middle and look
  stalemate record -o ls.trace -- ls -l /        record a real program's memory calls
  scripts/lab -- run unmap-race                  the same without KVM, with TLBs that can be stale";

pub(super) const RUN: &str = "\
Examples:
  stalemate run smoke --interrupts controlled --vcpus 1
  stalemate run unmap-race --bug shootdown-skip-remote --param flush_ceiling=1
  stalemate run smoke --check every-point --json result.json
  stalemate run trace-python3 --vcpus 4 --out results/python3
  stalemate run unmap-race --monitor --delay flush-dispatch@0=0..200us --seed 7
  stalemate run mprotect-race --interrupts controlled --ipi shootdown:p0.2=dup

--seed N is what --delay and --ipi draw from; run i of --runs draws from N + i - 1. It does not
choose the interleaving: the host's scheduler does. `explore` chooses it.

Exit codes:
  0  all invariants held
  1  a violation was found, whatever came after it
  2  bad input or usage: nothing ran; or the program refused its arguments, or memory ran out
  3  this host cannot (says what is missing, and how to get it)
  4  the guest crashed, hung, or was not done within --timeout
  5  internal error: a defect of stalemate
  130  Ctrl-C before anything wrong was found";

pub(super) const INSPECT: &str = "\
Examples:
  stalemate inspect smoke --at flush-issue            before the first shootdown chooses its CPUs
  stalemate inspect smoke --at pte-install:100 --mm 1 --range 0x400000..0x500000
  stalemate inspect unmap-race --after 50ms --gva 0x7fffdffff000
  stalemate inspect cow-fork --at fork-flush --frame 0x823000 --json

Exit codes are those of `run`; 2 also where the run ended before the place was reached.";

pub(super) const BENCH: &str = "\
Examples:
  stalemate bench                         every operation, here
  scripts/lab -- bench fault cow          two of them against the lab's own Linux
  stalemate bench fork --kernel my.elf --json fork.json

Each operation is timed alone, at CPL 3, in a fresh machine with one vCPU and in a fresh Linux process.
Where CPL 0 is emulated the kernel's instructions are counted instead.";

pub(super) const RECORD: &str = "\
Examples:
  stalemate record -o python3.trace -- python3 -c 'print(1)'
Replay it with a scenario of program 'replay' (docs/scenarios.md).";

pub(super) const EXPLORE: &str = "\
Examples:
  stalemate explore litmus-unmap                              10,000 schedules in this process
  stalemate explore litmus-unmap --bug shootdown-skip-remote  finds it, writes a reproducer
  stalemate explore litmus-unmap --strategy exhaustive        all with at most 2 preemptions, and
                                                              says whether that was complete
  stalemate explore litmus-cow --strategy exhaustive --preemptions 3 --jobs 2 --time-limit 1m
                                                              further, as far as a minute goes
  stalemate explore litmus-apart --engine kvm --window flush-issue --bug tlb-gen-plain-add --seed 1
                                                              a race between two instructions:
                                                              behind flush-issue, each is a point
  stalemate explore litmus-cow --engine kvm --schedules 200   the same kernel on real vCPUs
  stalemate explore litmus-cow --engine both --confirm 50     in process, then confirmed on vCPUs
  stalemate explore litmus-fork --fail-any frame-alloc        one allocation in each schedule fails
  stalemate replay out/litmus-unmap-t-01.repro --times 1000   bit for bit, 1000 times

A schedule says who runs for how many scheduling points. On the model engine the kernel runs inside
this process, without KVM. docs/explore.md explains both, docs/tlb-model.md what is judged.

--seed N draws the schedules, and what --fail-any lets fail: the same N gives the same campaign,
whatever --jobs is. Without it the clock chooses one, which is printed. A reproducer needs no seed.

Exit codes:
  0  nothing wrong was seen in what was tried
  1  a failure was found: a violation, a deadlock, a livelock, or a wrong value that a program read
  2  bad input or usage, or a test that does not fit: nothing was judged
  3  this host has no KVM that --engine kvm or both could use
  4  the guest crashed in every failure that was found
  5  two runs of one schedule, or the two engines, differ; or another defect of stalemate
  130  Ctrl-C before anything wrong was found";

pub(super) const REPLAY: &str = "\
Examples:
  stalemate replay out/litmus-unmap-t-01.repro                     once, with its story
  stalemate replay scenarios/reproducers/*.repro --expect --brief  for CI: 0 if all still fail so
  stalemate replay out/litmus-cow-t-01.repro --engine both         and on vCPUs: is it the same?
  stalemate replay out/litmus-cow-t-01.repro --any-kernel          0 where a change has cured it

There is no --seed: a reproducer holds the schedule itself, what fails in it, and the seeded bugs.

Exit codes:                 without --expect            with --expect
  0                         the failure is not there    it is there, every event as recorded
  1                         it is there                 it is not there, or another one is
  5                         the engines differ          so, or it is there but the events differ
  2  bad input: no reproducer, one of another kernel (--any-kernel), or an impossible schedule
  3  this host has no KVM that --engine kvm or both could use
  4  a vCPU did not come to a scheduling point
  130  Ctrl-C before all --times were replayed
Of several files the first code that is not 0 counts, but 5 wins. One that is refused does not keep
replay from the others.";

pub(super) const SNAPSHOT: &str = "\
Examples:
  stalemate snapshot litmus-unmap -o unmap.snapshot
  stalemate explore unmap.snapshot --schedules 500 --seed 1       does not boot, begins at once
  stalemate snapshot litmus-fork --vcpus 4 --bug free-before-flush -o fork.snapshot

Options of the machine and the kernel are given here; what explore chooses (--seed, --strategy,
--fail) is given there. A file belongs to the kernel and the CPU model that it was taken on.

Exit codes:
  0  the file is written
  2  bad input or usage, FILE is there already, or the set-up does not come to its end
  3  this host has no KVM
  4  a vCPU did not come to a scheduling point
  5  internal error: a defect of stalemate";

pub(super) const ORACLE: &str = "\
Examples:
  stalemate oracle                                     1000 cases of 50 steps, in this process
  stalemate oracle --cases 100000 --jobs 2 --seed 1
  stalemate oracle --engine kvm --cases 200            the kernel image on vCPUs
  stalemate oracle --seed 7 --first 4711 --cases 1     one case of a campaign again

A case is a short program of memory calls, loads, stores and forks. Linux executes it in a process
of its own, then the guest kernel does, and both must show the same after every step: the result,
what was read, the map of VMAs, which pages are in memory and what is in them. What differs is made
smaller and printed. docs/oracle.md says what is compared, and which rules of Linux are left out
because they depend on the host.

Exit codes:
  0  both agree
  1  they differ
  2  bad input or usage
  3  this host has no KVM that --engine kvm could use
  4  the guest crashed or hung
  5  internal error: a defect of stalemate
  130  Ctrl-C before anything differed";
