//! What the architecture says, rule by rule, so that tests can break each one and see that it matters.

/// A rule (SDM vol. 3A, section 5.10 and its subsections).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Law {
    /// 5.10.2.3: a translation is cached only with A set in its entry.
    OnlyAccessedIsCached,
    /// 5.8, 5.10.2.2: stores go without setting D only where D was set when the translation was cached.
    OnlyDirtyIsCachedDirty,
    /// 5.6.1, 5.10.2.2, 5.10.3.1: what is cached has the rights of all entries of its walk, at that time.
    RightsOfTheWholeWalk,
    /// 5.10.3.2: a walk may begin behind a cached pointer, also one that the tables no longer have.
    FillsThroughHeldPointers,
    /// 5.10.1: nothing is cached for a PCID that is not loaded.
    OnlyTheLoadedPcidFills,
    /// 5.10.1: what is cached is tagged with the PCID and not with the root.
    PcidsAreNotRoots,
    /// 5.10.4.1, MOV to CR3: with bit 63 nothing is dropped.
    Bit63Keeps,
    /// 5.10.4.1, MOV to CR3: only what is cached for the PCID that is loaded is dropped.
    Cr3DropsOnePcid,
    /// 5.10.2.4, 5.10.4.1: global translations survive a load of CR3 and serve every PCID.
    GlobalSurvivesCr3,
    /// 5.10.4.1, INVLPG: translations of the page for other PCIDs stay.
    InvlpgIsOfOnePcid,
    /// 5.10.4.1, INVLPG: a global translation of the page is dropped whatever PCID is loaded.
    InvlpgDropsGlobal,
    /// 5.10.4.1, INVLPG: every paging-structure cache of the PCID is dropped, whatever the address.
    InvlpgDropsAllPointers,
    /// 5.10.4.1, INVPCID type 0: only pointers that the address would use are dropped.
    InvpcidKeepsOtherPointers,
    /// 5.10.4.1, INVPCID: types 0, 1 and 3 may keep global translations.
    OnlyType2DropsGlobal,
    /// 5.10.2.3, 5.10.4.1: one address in it is enough to drop a page of any size.
    AnyAddressDropsAPage,
    /// 5.10.4.1: a page fault drops what the address would use.
    FaultsInvalidate,
}

/// The rules that hold: all, but in tests of the tests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Laws {
    #[cfg(test)]
    pub(super) broken: Option<Law>,
}

impl Laws {
    /// True where `law` holds.
    #[inline]
    #[cfg_attr(not(test), allow(clippy::unused_self, reason = "tests break laws"))]
    pub(super) fn obey(self, law: Law) -> bool {
        #[cfg(test)]
        return self.broken != Some(law);
        #[cfg(not(test))]
        {
            let _ = law;
            true
        }
    }
}

#[cfg(test)]
impl Law {
    /// Every one.
    pub(super) const EVERY: [Self; 16] = [
        Self::OnlyAccessedIsCached,
        Self::OnlyDirtyIsCachedDirty,
        Self::RightsOfTheWholeWalk,
        Self::FillsThroughHeldPointers,
        Self::OnlyTheLoadedPcidFills,
        Self::PcidsAreNotRoots,
        Self::Bit63Keeps,
        Self::Cr3DropsOnePcid,
        Self::GlobalSurvivesCr3,
        Self::InvlpgIsOfOnePcid,
        Self::InvlpgDropsGlobal,
        Self::InvlpgDropsAllPointers,
        Self::InvpcidKeepsOtherPointers,
        Self::OnlyType2DropsGlobal,
        Self::AnyAddressDropsAPage,
        Self::FaultsInvalidate,
    ];
}
