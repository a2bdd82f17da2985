//! Arguments of `oracle`.

use abi::bug::Bug;
use clap::Args;

use super::Json;
use super::values::{bug, duration, jobs, param};
use crate::engine::EngineKind;

/// `oracle`.
#[derive(Args, Debug)]
pub struct Oracle {
    /// Recorded programs (`record`), to run instead of cases that are drawn
    #[arg(value_name = "TRACE", conflicts_with_all = ["cases", "ops", "seed", "first", "shrink", "jobs"])]
    pub traces: Vec<std::path::PathBuf>,
    /// What executes the guest kernel
    #[arg(long, value_enum, default_value = "model")]
    pub engine: EngineKind,
    /// Cases to run
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pub cases: u64,
    /// Steps of each case, those of its forked processes included
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=500))]
    pub ops: u64,
    /// What the cases are drawn from: the same N gives the same cases [default: from the clock]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// First case: with --cases 1, runs only this one
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub first: u64,
    /// Machines that run at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = jobs)]
    pub jobs: usize,
    /// Longest time to make a difference smaller: 30s, 10m
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "60s")]
    pub shrink: std::time::Duration,
    /// Switch a seeded bug on; repeatable (`list bugs`)
    #[arg(long = "bug", value_name = "NAME", value_parser = bug, help_heading = "Kernel")]
    pub bugs: Vec<Bug>,
    /// Kernel parameter; repeatable (`list params`)
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = param, help_heading = "Kernel")]
    pub params: Vec<(String, String)>,
    /// `--json`.
    #[command(flatten)]
    pub json: Json,
}
