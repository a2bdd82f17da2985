//! The driver and the strategies on the [fake machine](super::testing).

mod commute;
mod driver;
mod lies;
mod reduction;
