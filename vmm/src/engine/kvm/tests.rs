use super::KvmEngine;
use crate::engine::model::ModelEngine;
use crate::engine::model::tests::{TESTS, litmus};
use crate::explore::campaign::{Plan, Worker, failure_id};
use crate::explore::compare;
use crate::explore::strategy::Random;

/// Needs /dev/kvm: without it the test fails and says so, it does not pass.
#[test]
fn both_engines_tell_the_same_story() {
    for test in TESTS {
        let scenario = litmus(test, None);
        let mut model = Worker::new(ModelEngine::new(&scenario).unwrap(), &Plan::replay()).unwrap();
        let engine = KvmEngine::new(&scenario).expect("this test needs /dev/kvm");
        let mut kvm = Worker::new(engine, &Plan::replay()).unwrap();
        let first = model.execute(&mut Random::new(11, 3, 6), false).unwrap();
        assert_eq!(
            failure_id(&first.ending),
            None,
            "{test}: {:?}",
            first.ending
        );
        let second = kvm.replay(&first.schedule).unwrap();
        let difference = compare::first_difference(&first.events, &second.events);
        assert_eq!(difference, None, "{test}: model here, kvm there");
        assert_eq!(second.schedule, first.schedule, "{test}");
        assert_eq!(
            failure_id(&second.ending),
            None,
            "{test}: {:?}",
            second.ending
        );
    }
}
