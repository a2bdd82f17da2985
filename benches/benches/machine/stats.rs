//! Samples and what is said of them.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;
use vmm::report::verdict::format_time;

/// Fewest samples of which a 99th percentile means anything: two lie above it.
pub(crate) const ENOUGH_FOR_P99: u64 = 200;

/// Samples, kept to four digits.
pub(crate) struct Samples(Histogram<u64>);

/// What is said of samples: nanoseconds or a count.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) samples: u64,
    pub(crate) min: u64,
    pub(crate) p50: u64,
    /// Only of [`ENOUGH_FOR_P99`] samples and more.
    pub(crate) p99: Option<u64>,
    pub(crate) max: u64,
}

impl Samples {
    pub(crate) fn new() -> Self {
        Self(Histogram::new(4).expect("four digits are allowed"))
    }

    pub(crate) fn add(&mut self, value: u64) {
        self.0.record(value).expect("the histogram grows by itself");
    }

    pub(crate) fn add_time(&mut self, time: Duration) {
        self.add(time.as_nanos() as u64);
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len()
    }

    pub(crate) fn summary(&self) -> Summary {
        Summary {
            samples: self.0.len(),
            min: self.0.min(),
            p50: self.0.value_at_quantile(0.5),
            p99: (self.0.len() >= ENOUGH_FOR_P99).then(|| self.0.value_at_quantile(0.99)),
            max: self.0.max(),
        }
    }
}

impl Summary {
    /// p50, p99 and max as times.
    pub(crate) fn times(&self) -> [String; 3] {
        [
            time(self.p50),
            self.p99.map_or("-".into(), time),
            time(self.max),
        ]
    }
}

/// Nanoseconds in the unit that suits them.
pub(crate) fn time(nanoseconds: u64) -> String {
    format_time(Duration::from_nanos(nanoseconds))
}

/// A number with its thousands apart.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
