use super::*;

fn disturber(vcpus: usize, delays: &[&str], ipis: &[&str]) -> (Disturber, Arc<LocalApics>) {
    let apics = Arc::new(LocalApics::new(vcpus));
    for vcpu in 0..vcpus {
        // Software enable.
        use devices::bus::Device;
        apics.write(vcpu, 0xf0, &0x1ff_u32.to_le_bytes());
    }
    let rules = Disturb {
        delays: delays.iter().map(|rule| rule.parse().unwrap()).collect(),
        ipis: ipis.iter().map(|rule| rule.parse().unwrap()).collect(),
        seed: 7,
    };
    let kicks: Vec<Arc<Kick>> = (0..vcpus).map(|_| Arc::default()).collect();
    let disturber = Disturber::new(&rules, &kicks, Some(&apics)).unwrap();
    (disturber.unwrap(), apics)
}

fn take(disturber: &Disturber, apics: &LocalApics, vcpu: usize) -> Option<u8> {
    use devices::bus::Device;
    let vector = apics.accept(vcpu)?;
    disturber.accepted(apics, vcpu);
    apics.write(vcpu, 0xb0, &[0; 4]);
    Some(vector)
}

#[test]
fn every_second_passage_is_held_and_tallied() {
    let (disturber, _) = disturber(2, &["flush-sync@1:every2=1ms"], &[]);
    assert!(disturber.is_own(1, Point::FlushSync) && !disturber.is_own(0, Point::FlushSync));
    for passage in 1..=4 {
        disturber.passed(0, Point::FlushSync);
        assert!(disturber.held_back(0).is_none());
        disturber.passed(1, Point::FlushSync);
        assert_eq!(disturber.held_back(1).is_some(), passage % 2 == 0);
        while disturber.held_back(1).is_some() {
            std::thread::yield_now();
        }
    }
    let report = &disturber.report()[0];
    assert_eq!((report.passages, report.hits), (4, 2));
    assert!(
        report.held_ns >= 2_000_000 && report.longest_ns >= 1_000_000,
        "{report:?}"
    );
}

#[test]
fn a_vcpu_waits_until_the_other_one_has_passed() {
    let rule = "pte-clear@0=until:ipi-receive@1,1s";
    let (disturber, _) = disturber(3, &[rule], &[]);
    disturber.passed(0, Point::PteClear);
    disturber.passed(2, Point::IpiReceive);
    disturber.passed(1, Point::FlushSync);
    assert!(disturber.held_back(0).is_some());
    disturber.passed(1, Point::IpiReceive);
    assert!(disturber.held_back(0).is_none());
    assert_eq!(disturber.report()[0].timeouts, 0);
    assert!(disturber.is_own(1, Point::IpiReceive) && !disturber.is_own(2, Point::IpiReceive));
}

#[test]
fn a_wait_for_what_never_comes_ends_and_is_counted() {
    let (disturber, _) = disturber(2, &["pte-clear=until:ipi-receive,1ms"], &[]);
    disturber.passed(0, Point::PteClear);
    while disturber.held_back(0).is_some() {
        std::thread::yield_now();
    }
    assert_eq!(disturber.report()[0].timeouts, 1);
}

#[test]
fn the_seed_alone_decides_what_is_drawn() {
    let draws = |seed: u64| -> Vec<bool> {
        let rules = Disturb {
            delays: vec!["flush-sync:p0.5=1us".parse().unwrap()],
            seed,
            ..Disturb::default()
        };
        let disturber = Disturber::new(&rules, &[Arc::default()], None)
            .unwrap()
            .unwrap();
        let draw = |_| {
            let before = disturber.report()[0].hits;
            disturber.passed(0, Point::FlushSync);
            disturber.report()[0].hits > before
        };
        (0..64).map(draw).collect()
    };
    assert_eq!(draws(1), draws(1));
    assert_ne!(draws(1), draws(2));
    assert!(draws(1).contains(&true) && draws(1).contains(&false));
}

#[test]
fn a_dropped_ipi_does_not_arrive_and_is_named() {
    let (disturber, apics) = disturber(2, &[], &["shootdown@0-1:nth2=drop"]);
    assert!(disturber.send(&apics, 0, 1, 0xf0));
    assert_eq!(take(&disturber, &apics, 1), Some(0xf0));
    assert!(!disturber.send(&apics, 0, 1, 0xf0));
    assert_eq!(take(&disturber, &apics, 1), None);
    assert!(disturber.send(&apics, 0, 1, 0xf1) && disturber.send(&apics, 1, 0, 0xf0));
    let lost = disturber.lost();
    assert!(
        lost[0].contains("1 shootdown IPIs from vCPU 0 to vCPU 1"),
        "{lost:?}"
    );
}

#[test]
fn a_duplicate_is_taken_twice() {
    let (disturber, apics) = disturber(2, &[], &["any=dup"]);
    assert!(disturber.send(&apics, 0, 1, 0xf0));
    assert_eq!(take(&disturber, &apics, 1), Some(0xf0));
    assert_eq!(take(&disturber, &apics, 1), Some(0xf0));
    assert_eq!(take(&disturber, &apics, 1), None);
}

#[test]
fn one_that_is_reordered_comes_after_the_next() {
    let (disturber, apics) = disturber(2, &[], &["shootdown=reorder:1s"]);
    assert!(!disturber.send(&apics, 0, 1, 0xf0));
    assert_eq!(take(&disturber, &apics, 1), None);
    assert!(disturber.send(&apics, 0, 1, 0xf1));
    assert_eq!(take(&disturber, &apics, 1), Some(0xf1));
    assert_eq!(take(&disturber, &apics, 1), Some(0xf0));
}

#[test]
fn a_delayed_ipi_arrives_and_so_does_one_that_nothing_overtakes() {
    for rule in ["any=delay:1ms", "any=reorder:1ms"] {
        let (disturber, apics) = disturber(2, &[], &[rule]);
        assert!(!disturber.send(&apics, 0, 1, 0xf0));
        while take(&disturber, &apics, 1).is_none() {
            std::thread::yield_now();
        }
        assert_eq!(disturber.report()[0].hits, 1);
    }
}
